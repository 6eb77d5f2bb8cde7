postern_unit_test(sshd_broker
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/sshd_broker_config_test.cpp ${CMAKE_CURRENT_LIST_DIR}/sshd_broker_keys_test.cpp
          ${CMAKE_CURRENT_LIST_DIR}/sshd_broker_audit_test.cpp ${CMAKE_CURRENT_LIST_DIR}/sshd_broker_penalties_test.cpp ${CMAKE_CURRENT_LIST_DIR}/sshd_broker_rules_test.cpp ${CMAKE_CURRENT_LIST_DIR}/sshd_broker_takeover_test.cpp ${CMAKE_CURRENT_LIST_DIR}/sshd_broker_zygote_test.cpp
  DEPS postern::sshd_broker)
