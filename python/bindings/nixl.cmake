nixl_module(nixl bindings/agent.cc bindings/descs.cc)
