# nixl_test(NAME sources... DEPS libraries... [TIMEOUT seconds] [LAUNCH command...]): a test program `NAME` run by ctest, behind
# a command if one is given. Exit 77 = skipped. The check macros are in tests/support/check.h; every test program has a time limit.
function(nixl_test NAME)
  if(NOT NIXL_BUILD_TESTS)
    return()
  endif()
  cmake_parse_arguments(ARG "" "TIMEOUT" "DEPS;LINK;LAUNCH" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 60)
  endif()
  if(NIXL_SANITIZE)
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 5")  # the thread sanitizer makes loops over memory ten times as slow
  endif()
  add_executable(${NAME} ${ARG_UNPARSED_ARGUMENTS})
  target_include_directories(${NAME} PRIVATE ${CMAKE_SOURCE_DIR}/tests/support)
  foreach(dep IN LISTS ARG_DEPS)
    target_link_libraries(${NAME} PRIVATE nixl_${dep})
  endforeach()
  target_link_libraries(${NAME} PRIVATE ${ARG_LINK} Threads::Threads)
  add_test(NAME ${NAME} COMMAND ${ARG_LAUNCH} $<TARGET_FILE:${NAME}>)
  set_tests_properties(${NAME} PROPERTIES TIMEOUT ${ARG_TIMEOUT} SKIP_RETURN_CODE 77)
  if(NIXL_SANITIZE MATCHES "thread")  # a forked child may have threads of its own
    set_property(TEST ${NAME} APPEND PROPERTY ENVIRONMENT "TSAN_OPTIONS=die_after_fork=0")
  endif()
endfunction()

# nixl_use_stand_in(TEST NAME DEFINITION): gives the test program DEFINITION, the path of a library made of
# tests/support/stand_in_NAME.cc: `cufile`, under cuFile's and CUDA's names, works on host memory, so that the logic for GPU memory
# runs where there is no GPU; `3fs`, under the names of the 3FS client, serves a plain directory.
function(nixl_use_stand_in TEST NAME DEFINITION)
  set(library nixl_stand_in_${NAME})
  if(NOT TARGET ${library})
    add_library(${library} SHARED ${CMAKE_SOURCE_DIR}/tests/support/stand_in_${NAME}.cc)
    set_target_properties(${library} PROPERTIES CXX_VISIBILITY_PRESET default)
  endif()
  add_dependencies(${TEST} ${library})
  target_compile_definitions(${TEST} PRIVATE ${DEFINITION}="$<TARGET_FILE:${library}>")
endfunction()

# Runs a program beside an S3 server of its own, which NIXL_TEST_S3 names to it.
set(NIXL_WITH_S3 python3 ${CMAKE_SOURCE_DIR}/tests/support/object_servers.py with-s3)
