postern_unit_test(sshd_protocol
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/sshd_protocol_facts_test.cpp ${CMAKE_CURRENT_LIST_DIR}/sshd_protocol_forward_targets_test.cpp
  DEPS postern::sshd_protocol)
