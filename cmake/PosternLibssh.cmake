# postern::libssh: the SSH library of postern-net, by -DPOSTERN_LIBSSH=
#   bundled        (default) the version that cmake/libssh-pin.cmake names, from Debian's source package, static, unpatched: post-quantum
#                  key exchange and, by its internal headers, delegated host key signing, terminal modes, own windows
#   system-static  the distribution's libssh.a            } opt-in, not in this version: they come with issue 5
#   system         the distribution's shared library      }
# Source and builds lie in build/deps/libssh, shared by all presets: one download, one build per compiler and sanitizer.
# Only sshd/net/libssh_ext.cpp may include a private header (macro POSTERN_LIBSSH_INTERNALS).
include(${CMAKE_CURRENT_LIST_DIR}/libssh-pin.cmake)
set(POSTERN_LIBSSH_TARBALL "" CACHE FILEPATH "a local copy of the pinned libssh orig tarball, instead of the network")

if(POSTERN_LIBSSH MATCHES "^system(-static)?$")
  message(FATAL_ERROR "POSTERN_LIBSSH=${POSTERN_LIBSSH} arrives with issue 5 (without the internal headers the host key would have to live "
    "in the network process). Use -DPOSTERN_LIBSSH=bundled; offline: -DPOSTERN_LIBSSH_TARBALL=/path/to/libssh_0.12.2.orig.tar.xz")
elseif(NOT POSTERN_LIBSSH STREQUAL "bundled")
  message(FATAL_ERROR "POSTERN_LIBSSH=${POSTERN_LIBSSH}: must be bundled, system-static or system")
endif()

function(postern_build_libssh)
  set(deps ${PROJECT_SOURCE_DIR}/build/deps/libssh)
  file(MAKE_DIRECTORY ${deps})
  file(LOCK ${deps}/lock GUARD FUNCTION TIMEOUT 600)   # two presets may configure at once

  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/cmake/libssh-pin.cmake)
  set(tarball ${deps}/libssh.orig.tar.xz)
  set(have "")
  if(EXISTS ${tarball})
    file(SHA256 ${tarball} have)
  endif()
  if(NOT have STREQUAL POSTERN_LIBSSH_SHA256)
    # A stand-in of the same series (the pin was gone from the mirror) is kept until the pin changes or a build folder is new.
    if(NOT EXISTS ${tarball} OR NOT EXISTS ${deps}/stand-in-for-${POSTERN_LIBSSH_VERSION} OR POSTERN_LIBSSH_TARBALL)
      message(STATUS "libssh ${POSTERN_LIBSSH_VERSION}: fetching")
      execute_process(COMMAND ${PROJECT_SOURCE_DIR}/scripts/fetch-libssh ${deps} ${POSTERN_LIBSSH_TARBALL} RESULT_VARIABLE result)
      if(NOT result EQUAL 0)
        message(FATAL_ERROR "libssh ${POSTERN_LIBSSH_VERSION} could not be fetched; see above for the other ways")
      endif()
      file(SHA256 ${tarball} have)
      if(NOT have STREQUAL POSTERN_LIBSSH_SHA256)
        file(TOUCH ${deps}/stand-in-for-${POSTERN_LIBSSH_VERSION})
      endif()
    endif()
  endif()
  file(STRINGS ${deps}/version version LIMIT_COUNT 1)
  if(NOT have STREQUAL POSTERN_LIBSSH_SHA256)
    message(WARNING "libssh ${version} stands in for the pinned ${POSTERN_LIBSSH_VERSION}, which the mirror no longer has")
  endif()
  string(REGEX REPLACE "-[^-]*$" "" upstream ${version})

  # UBSan is for our own code: libssh's bundled ML-KEM is ten times slower with it and not ours to mend.
  string(REPLACE "," ";" sanitizers "${POSTERN_SANITIZE}")
  list(REMOVE_ITEM sanitizers undefined)
  list(JOIN sanitizers "," sanitizers)
  set(flags "-DMAX_BUF_SIZE=262144 -ffunction-sections -fdata-sections")   # 256 KiB reads: -15..30 % CPU on uploads, research/libssh-0.12.md 4
  if(sanitizers)
    string(APPEND flags " -fsanitize=${sanitizers} -fno-omit-frame-pointer")
  endif()
  set(arguments -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_C_COMPILER=${CMAKE_C_COMPILER} "-DCMAKE_C_FLAGS=${flags}"
    -DBUILD_SHARED_LIBS=OFF -DCMAKE_POSITION_INDEPENDENT_CODE=ON -DWITH_SERVER=ON -DWITH_SFTP=OFF -DWITH_GSSAPI=OFF -DWITH_EXAMPLES=OFF
    -DWITH_EXEC=OFF -DWITH_PCAP=OFF -DWITH_FIDO2=OFF -DWITH_ZLIB=OFF -DWITH_GEX=OFF -DWITH_NACL=OFF -DUNIT_TESTING=OFF)
  string(SHA256 key "${have};${CMAKE_C_COMPILER};${CMAKE_C_COMPILER_VERSION};${arguments}")
  string(SUBSTRING ${key} 0 8 key)
  set(build ${deps}/build-${upstream}-${key})
  set(source ${deps}/libssh-${upstream})
  if(NOT EXISTS ${build}/done)
    if(NOT EXISTS ${source}/CMakeLists.txt)
      file(ARCHIVE_EXTRACT INPUT ${tarball} DESTINATION ${deps})
    endif()
    message(STATUS "libssh ${version}: building in ${build} (about half a minute, once)")
    set(launcher)
    if(POSTERN_CCACHE)
      set(launcher -DCMAKE_C_COMPILER_LAUNCHER=${POSTERN_CCACHE})
    endif()
    foreach(step "-S;${source};-B;${build};-G;${CMAKE_GENERATOR};${launcher};${arguments}" "--build;${build};--target;ssh;--parallel;2")
      execute_process(COMMAND ${CMAKE_COMMAND} ${step} OUTPUT_FILE ${deps}/log ERROR_FILE ${deps}/log RESULT_VARIABLE result)
      if(NOT result EQUAL 0)
        file(READ ${deps}/log log)
        message(FATAL_ERROR "libssh ${version} does not build:\n${log}")
      endif()
    endforeach()
    file(TOUCH ${build}/done)
  endif()
  message(STATUS "libssh ${version}: ${build}/src/libssh.a")

  add_library(postern_libssh INTERFACE)
  add_library(postern::libssh ALIAS postern_libssh)
  # config.h must be that of the library's own build: struct layouts depend on it.
  target_include_directories(postern_libssh SYSTEM INTERFACE ${build}/include ${source}/include)
  target_compile_definitions(postern_libssh INTERFACE POSTERN_LIBSSH_INTERNALS LIBSSH_STATIC)
  target_link_libraries(postern_libssh INTERFACE ${build}/src/libssh.a OpenSSL::Crypto Threads::Threads)
  # ld is silent when a name that is wrapped does not exist (any more): libssh_ext.cpp takes the address of __real_... as well.
  target_link_options(postern_libssh INTERFACE -Wl,--wrap=ssh_srv_pki_do_sign_sessionid -Wl,--gc-sections)
  set_property(TARGET postern_libssh PROPERTY POSTERN_LIBSSH_PRIVATE_INCLUDES ${build})
endfunction()
postern_build_libssh()
