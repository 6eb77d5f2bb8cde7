# One place for language level, warnings, hardening and sanitizers; every target of ours links postern_options.
set(postern_sanitized 0)
if(POSTERN_SANITIZE)
  set(postern_sanitized 1)   # not $<BOOL:...>: the list's comma would end its argument
endif()
add_library(postern_options INTERFACE)
target_compile_features(postern_options INTERFACE cxx_std_20)
target_include_directories(postern_options INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_definitions(postern_options INTERFACE
  POSTERN_VERSION="${PROJECT_VERSION}" BOOST_ASIO_NO_DEPRECATED BOOST_ASIO_SEPARATE_COMPILATION SPDLOG_FMT_EXTERNAL)
target_compile_options(postern_options INTERFACE
  -Wall -Wextra -Wshadow -Wnon-virtual-dtor -fstack-protector-strong
  $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-mismatched-new-delete>
  $<$<AND:$<CONFIG:Release,RelWithDebInfo>,$<NOT:${postern_sanitized}>>:-U_FORTIFY_SOURCE;-D_FORTIFY_SOURCE=2;-D_GLIBCXX_ASSERTIONS;-fstack-clash-protection;-fcf-protection>
  $<$<CXX_COMPILER_ID:GNU>:-ftrivial-auto-var-init=zero>)
target_link_options(postern_options INTERFACE -Wl,-z,relro,-z,now)
if(POSTERN_SANITIZE)
  target_compile_options(postern_options INTERFACE -fsanitize=${POSTERN_SANITIZE} -fno-omit-frame-pointer)
  target_link_options(postern_options INTERFACE -fsanitize=${POSTERN_SANITIZE})
  target_compile_definitions(postern_options INTERFACE POSTERN_SANITIZED)
  if(POSTERN_SANITIZE MATCHES thread)
    target_compile_definitions(postern_options INTERFACE BOOST_ASIO_DISABLE_FENCED_BLOCK)
    target_compile_options(postern_options INTERFACE -Wno-tsan)
  endif()
endif()

# postern_library(recorder_cast SOURCES a.cpp HEADERS a.h DEPS postern::base)
#   -> static library postern_recorder_cast with the alias postern::recorder_cast. Includes read "folder/file.h".
function(postern_library name)
  cmake_parse_arguments(L "" "" "SOURCES;HEADERS;DEPS" ${ARGN})
  add_library(postern_${name} STATIC ${L_SOURCES})
  add_library(postern::${name} ALIAS postern_${name})
  target_sources(postern_${name} PUBLIC FILE_SET HEADERS BASE_DIRS ${PROJECT_SOURCE_DIR} FILES ${L_HEADERS})
  target_link_libraries(postern_${name} PUBLIC postern_options ${L_DEPS})
endfunction()

# postern_program(postern-relay SOURCES main.cpp DEPS postern::recorder_relay)
function(postern_program name)
  cmake_parse_arguments(P "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name} ${P_SOURCES})
  target_link_libraries(${name} PRIVATE postern_options ${P_DEPS})
endfunction()

# postern_unit_test(auth_policy SOURCES a_test.cpp DEPS postern::auth_policy): one binary a folder, discovered by ctest,
# label "unit". Put the call in tests/CMakeLists.txt's folder lists (tests/unit/<name>.cmake).
function(postern_unit_test name)
  cmake_parse_arguments(T "" "" "SOURCES;DEPS" ${ARGN})
  add_executable(${name}_test ${T_SOURCES})
  target_link_libraries(${name}_test PRIVATE postern_options postern_catch ${T_DEPS})
  # The tests' own code need not be quick, and Catch's macros make GCC's -O2 and variable tracking slow: 26 s became 15 s for the largest.
  target_compile_options(${name}_test PRIVATE -O1 $<$<CXX_COMPILER_ID:GNU>:-fno-var-tracking>)
  catch_discover_tests(${name}_test TEST_PREFIX "${name}." PROPERTIES LABELS unit)
endfunction()
