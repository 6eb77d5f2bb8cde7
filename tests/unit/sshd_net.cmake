# A stand-in for posternd and postern-session, for the tests of postern-net alone (tests/integration/net).
add_executable(net_harness ${CMAKE_CURRENT_LIST_DIR}/../tools/net_harness.cpp)
target_link_libraries(net_harness PRIVATE postern_options postern::sshd_net nlohmann_json::nlohmann_json util)

postern_unit_test(sshd_net
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/sshd_net_link_test.cpp ${CMAKE_CURRENT_LIST_DIR}/sshd_net_packet_view_test.cpp
    ${CMAKE_CURRENT_LIST_DIR}/sshd_net_sandbox_test.cpp
  DEPS postern::sshd_net postern::libssh_text)
