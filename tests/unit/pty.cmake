postern_unit_test(pty
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/pty_modes_test.cpp ${CMAKE_CURRENT_LIST_DIR}/pty_become_user_test.cpp ${CMAKE_CURRENT_LIST_DIR}/pty_launch_test.cpp
  DEPS postern::pty PkgConfig::SECCOMP nlohmann_json::nlohmann_json)
