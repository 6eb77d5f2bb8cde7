postern_unit_test(auth_identity
  SOURCES ${CMAKE_CURRENT_LIST_DIR}/auth_identity_socket_owner_test.cpp ${CMAKE_CURRENT_LIST_DIR}/auth_identity_static_provider_test.cpp ${CMAKE_CURRENT_LIST_DIR}/auth_identity_tailscaled_test.cpp
          ${CMAKE_CURRENT_LIST_DIR}/auth_identity_tailscaled_provider_test.cpp ${CMAKE_CURRENT_LIST_DIR}/auth_identity_wireguard_test.cpp
  DEPS postern::auth_identity)
