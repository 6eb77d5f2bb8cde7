postern_unit_test(sshd_session
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/sshd_session_environment_test.cpp ${CMAKE_CURRENT_LIST_DIR}/sshd_session_logins_test.cpp
          ${CMAKE_CURRENT_LIST_DIR}/sshd_session_process_test.cpp
          ${CMAKE_CURRENT_LIST_DIR}/sshd_session_rules_test.cpp ${CMAKE_CURRENT_LIST_DIR}/sshd_session_tree_test.cpp
          ${PROJECT_SOURCE_DIR}/tests/tools/session_harness.cpp
  DEPS postern::sshd_session)
target_compile_definitions(sshd_session_test PRIVATE POSTERN_BIN_DIR="${PROJECT_BINARY_DIR}/bin")
add_dependencies(sshd_session_test postern-session)
