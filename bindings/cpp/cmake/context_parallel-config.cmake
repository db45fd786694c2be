# find_package(context_parallel): the target context_parallel::context_parallel, C and C++ headers included.
#
#   cmake -Dcontext_parallel_DIR=<this folder> ...      from a source tree, after cargo build --release
#   or installed as <prefix>/share/context_parallel/, next to <prefix>/include and <prefix>/lib
#
# context_parallel_LIBRARY may name another libcontext_parallel.so.
get_filename_component(_cp_tree "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
get_filename_component(_cp_prefix "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)

find_library(context_parallel_LIBRARY context_parallel
    HINTS "${_cp_tree}/target/release" "${_cp_prefix}/lib" NO_DEFAULT_PATH)
find_path(context_parallel_INCLUDE_DIR context_parallel.h
    HINTS "${_cp_tree}/include" "${_cp_prefix}/include" NO_DEFAULT_PATH)
find_path(context_parallel_CPP_INCLUDE_DIR context_parallel.hpp
    HINTS "${_cp_tree}/bindings/cpp" "${_cp_prefix}/include" NO_DEFAULT_PATH)
mark_as_advanced(context_parallel_LIBRARY context_parallel_INCLUDE_DIR context_parallel_CPP_INCLUDE_DIR)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(context_parallel
    REQUIRED_VARS context_parallel_LIBRARY context_parallel_INCLUDE_DIR context_parallel_CPP_INCLUDE_DIR)

if(context_parallel_FOUND AND NOT TARGET context_parallel::context_parallel)
    add_library(context_parallel::context_parallel SHARED IMPORTED)
    # The library has no SONAME, so programs must not record the path that the linker was given.
    set_target_properties(context_parallel::context_parallel PROPERTIES
        IMPORTED_LOCATION "${context_parallel_LIBRARY}"
        IMPORTED_NO_SONAME TRUE
        INTERFACE_INCLUDE_DIRECTORIES "${context_parallel_INCLUDE_DIR};${context_parallel_CPP_INCLUDE_DIR}")
endif()
