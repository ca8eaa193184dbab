# nixl_library(NAME PATH sources... DEPS other... LINK vendor...)
#
# One folder of src/ as a static library `nixl_NAME`. Its include root holds that folder alone, so a file can include
# "PATH/x.h" of a library only if it links it: an arrow of the wrong direction does not compile.
#   PATH  folder below src/, also the prefix of its includes
#   DEPS  libraries of this project (public: their roots are passed on)
#   LINK  anything else
function(nixl_library NAME PATH)
  cmake_parse_arguments(ARG "" "" "DEPS;LINK" ${ARGN})
  set(sources ${ARG_UNPARSED_ARGUMENTS})
  set(root ${CMAKE_BINARY_DIR}/roots/${NAME})
  get_filename_component(parent ${root}/${PATH} DIRECTORY)
  file(MAKE_DIRECTORY ${parent})
  if(NOT EXISTS ${root}/${PATH})
    file(CREATE_LINK ${CMAKE_SOURCE_DIR}/src/${PATH} ${root}/${PATH} SYMBOLIC)
  endif()
  if(sources)
    add_library(nixl_${NAME} STATIC ${sources})
    set(scope PUBLIC)
  else()
    add_library(nixl_${NAME} INTERFACE)
    set(scope INTERFACE)
  endif()
  target_include_directories(nixl_${NAME} ${scope} ${root})
  foreach(dep IN LISTS ARG_DEPS)
    target_link_libraries(nixl_${NAME} ${scope} nixl_${dep})
  endforeach()
  target_link_libraries(nixl_${NAME} ${scope} ${ARG_LINK})
endfunction()
