# nixl_backend(NAME sources... DEPS other... LINK vendor... [MODULE])
#
# A folder of src/backends as a library `nixl_backend_NAME`. Built-in backends are linked into libnixl and entered in its
# table; with MODULE the same sources become plugins/libplugin_<UPPERCASE NAME>.so, loaded when the backend is first asked for.
function(nixl_backend NAME)
  cmake_parse_arguments(ARG "MODULE" "" "DEPS;LINK" ${ARGN})
  nixl_library(backend_${NAME} backends/${NAME} ${ARG_UNPARSED_ARGUMENTS} DEPS contract ${ARG_DEPS} LINK ${ARG_LINK})
  if(ARG_MODULE)
    set_property(GLOBAL APPEND PROPERTY NIXL_MODULE_BACKENDS ${NAME})
  else()
    set_property(GLOBAL APPEND PROPERTY NIXL_BUILTIN_BACKENDS ${NAME})
  endif()
endfunction()
