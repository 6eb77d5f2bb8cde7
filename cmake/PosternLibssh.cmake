# postern::libssh: the SSH library of postern-net, by -DPOSTERN_LIBSSH=
#   bundled        (default) the version that cmake/libssh-pin.cmake names, from Debian's source package, static, unpatched: post-quantum
#                  key exchange and, by its internal headers, delegated host key signing, terminal modes, own windows
#   system-static  the distribution's libssh.a (package libssh-dev), with the internal headers of the same Debian source version: the same
#                  but for what is listed as missing below; security fixes come with the distribution's package and a rebuild
#   system         the distribution's shared library: refused, see the message
# Source and builds lie in build/deps/libssh, shared by all presets: one download, one build per compiler and sanitizer.
# Only sshd/net/libssh_ext.cpp (and tests/fuzz/fuzz_net.cpp) may include a private header (macro POSTERN_LIBSSH_INTERNALS).
# What `posternd --version` says of it is POSTERN_LIBSSH_TEXT of libssh_text.h in postern::libssh_text.
include(${CMAKE_CURRENT_LIST_DIR}/libssh-pin.cmake)
set(POSTERN_LIBSSH_TARBALL "" CACHE FILEPATH "instead of the network: bundled, a copy of the pinned orig tarball; system-static, a .dsc with its files next to it")

if(POSTERN_LIBSSH STREQUAL "system")
  message(FATAL_ERROR "POSTERN_LIBSSH=system is not offered: by the shared library's public API a host key cannot sign in another process, so it "
    "would have to live in the one that parses strangers' bytes; nor has that API terminal modes, break, unix-socket forwarding or own windows. "
    "Use bundled (offline: -DPOSTERN_LIBSSH_TARBALL=/path/to/libssh_0.12.2.orig.tar.xz) or system-static (the distribution's libssh.a; needs "
    "libssh-dev, libkrb5-dev, zlib1g-dev and patch)")
elseif(NOT POSTERN_LIBSSH MATCHES "^(bundled|system-static)$")
  message(FATAL_ERROR "POSTERN_LIBSSH=${POSTERN_LIBSSH}: must be bundled, system-static or system")
endif()

# The target, of an archive, the folder of its config.h, and its headers.
function(postern_add_libssh archive build source)
  add_library(postern_libssh INTERFACE)
  add_library(postern::libssh ALIAS postern_libssh)
  # config.h must be that of the library's own build: struct layouts depend on it.
  target_include_directories(postern_libssh SYSTEM INTERFACE ${build}/include ${source}/include)
  target_compile_definitions(postern_libssh INTERFACE POSTERN_LIBSSH_INTERNALS LIBSSH_STATIC)
  target_link_libraries(postern_libssh INTERFACE ${archive} ${ARGN} OpenSSL::Crypto Threads::Threads)
  # ld is silent when a name that is wrapped does not exist (any more): libssh_ext.cpp takes the address of __real_... as well.
  target_link_options(postern_libssh INTERFACE -Wl,--wrap=ssh_srv_pki_do_sign_sessionid -Wl,--wrap=ssh_buffer_get_u8 -Wl,--wrap=ssh_packet_decrypt
    -Wl,--wrap=ssh_packet_hmac_verify -Wl,--wrap=ssh_packet_encrypt -Wl,--gc-sections)
  set_property(TARGET postern_libssh PROPERTY POSTERN_LIBSSH_PRIVATE_INCLUDES ${build})
endfunction()

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
  if(POSTERN_FUZZ)
    string(APPEND flags " -fsanitize=fuzzer-no-link,address -fno-omit-frame-pointer")
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

  postern_add_libssh(${build}/src/libssh.a ${build} ${source})
  set(POSTERN_LIBSSH_TEXT "libssh ${upstream} bundled" PARENT_SCOPE)
endfunction()

function(postern_use_system_libssh)
  find_library(POSTERN_LIBSSH_ARCHIVE libssh.a)
  find_library(POSTERN_LIBSSH_GSSAPI gssapi_krb5)   # the archive wants both; postern-net never calls them
  find_library(POSTERN_LIBSSH_ZLIB z)
  find_program(POSTERN_DPKG_QUERY dpkg-query)
  if(NOT POSTERN_LIBSSH_ARCHIVE OR NOT POSTERN_LIBSSH_GSSAPI OR NOT POSTERN_LIBSSH_ZLIB OR NOT POSTERN_DPKG_QUERY)
    message(FATAL_ERROR "POSTERN_LIBSSH=system-static needs Debian's libssh-dev, libkrb5-dev, zlib1g-dev and patch")
  endif()
  # When the package is updated: configure again, and with it fetch.
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${POSTERN_LIBSSH_ARCHIVE} ${PROJECT_SOURCE_DIR}/scripts/fetch-libssh)
  execute_process(COMMAND ${POSTERN_DPKG_QUERY} -W -f "\${source:Version}" libssh-dev OUTPUT_VARIABLE version RESULT_VARIABLE result)
  if(NOT result EQUAL 0 OR NOT version MATCHES "^[0-9][^ ]*-[^-]*$")
    message(FATAL_ERROR "POSTERN_LIBSSH=system-static: ${POSTERN_LIBSSH_ARCHIVE} is not of a package libssh-dev, so its headers' version is unknown")
  endif()
  set(deps ${PROJECT_SOURCE_DIR}/build/deps/libssh-system/${version})
  file(MAKE_DIRECTORY ${deps})
  file(LOCK ${deps}/lock GUARD FUNCTION TIMEOUT 600)
  set(build ${deps}/configured)
  if(NOT EXISTS ${build}/done OR POSTERN_LIBSSH_TARBALL)
    message(STATUS "libssh ${version}: fetching its private headers")
    execute_process(COMMAND ${PROJECT_SOURCE_DIR}/scripts/fetch-libssh --headers ${version} ${deps} ${POSTERN_LIBSSH_TARBALL} RESULT_VARIABLE result)
    if(NOT result EQUAL 0)
      message(FATAL_ERROR "the headers of libssh ${version} could not be fetched; see above for another way")
    endif()
    # Configured as debian/rules does, never built: struct layouts depend on config.h (postern-net checks them when it starts).
    execute_process(COMMAND ${CMAKE_COMMAND} -S ${deps}/source -B ${build} -G ${CMAKE_GENERATOR} -DCMAKE_C_COMPILER=${CMAKE_C_COMPILER} -DCMAKE_BUILD_TYPE=None
      -DBUILD_STATIC_LIB=ON -DUNIT_TESTING=OFF -DWITH_GSSAPI=ON -DWITH_EXAMPLES=OFF OUTPUT_FILE ${deps}/log ERROR_FILE ${deps}/log RESULT_VARIABLE result)
    if(NOT result EQUAL 0)
      file(READ ${deps}/log log)
      message(FATAL_ERROR "libssh ${version} cannot be configured:\n${log}")
    endif()
    file(TOUCH ${build}/done)
  endif()
  file(STRINGS ${deps}/version headers LIMIT_COUNT 1)
  if(NOT headers STREQUAL version)
    message(WARNING "the private headers are those of libssh ${headers}, the archive is ${version}")
  endif()
  message(STATUS "libssh ${version}: ${POSTERN_LIBSSH_ARCHIVE}")

  set(missing "")
  if(version VERSION_LESS 0.12)
    list(APPEND missing "post-quantum key exchange")
  endif()
  list(APPEND missing "large reads")   # MAX_BUF_SIZE is a flag of the library's own build
  list(JOIN missing ", " missing)
  postern_add_libssh(${POSTERN_LIBSSH_ARCHIVE} ${build} ${deps}/source ${POSTERN_LIBSSH_GSSAPI} ${POSTERN_LIBSSH_ZLIB})
  target_compile_definitions(postern_libssh INTERFACE POSTERN_LIBSSH_SYSTEM_STATIC)
  set(POSTERN_LIBSSH_TEXT "libssh ${version} system-static; missing: ${missing}" PARENT_SCOPE)
endfunction()

if(POSTERN_LIBSSH STREQUAL "bundled")
  postern_build_libssh()
else()
  postern_use_system_libssh()
endif()
# Its own target and header: posternd says it and never links libssh; in a definition on a command line the semicolon would end a list.
file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/generated/libssh_text.h CONTENT "#define POSTERN_LIBSSH_TEXT \"@POSTERN_LIBSSH_TEXT@\"\n" @ONLY)
add_library(postern_libssh_text INTERFACE)
add_library(postern::libssh_text ALIAS postern_libssh_text)
target_include_directories(postern_libssh_text INTERFACE ${PROJECT_BINARY_DIR}/generated)
