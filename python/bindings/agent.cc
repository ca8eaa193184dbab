// nixl._native: nixl::Agent under the names of the low-level Python interface. The GIL is released around native work.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/unordered_map.h>
#include <nanobind/stl/vector.h>
#include <nixl/agent.h>
#include <nixl/backend.h>
#include <nixl/version.h>

#include "descs.h"
#include "gil.h"
#include "index_run.h"

namespace nixl::python {
using nb::literals::operator""_a;
namespace {

constexpr const char* kKindNames[] = {"DRAM_SEG", "VRAM_SEG", "BLK_SEG", "OBJ_SEG", "FILE_SEG"};
using Handle = Agent::Handle;
using Ids = Agent::BackendIds;

struct Config {
  bool use_prog_thread = true, use_listen_thread = false;
  std::uint16_t listen_port = 8888;
  nb::object sync_mode = nb::int_(0);
  std::uint64_t num_workers = 1, pthr_delay = 0, lthr_delay = 100'000;
  bool capture_telemetry = false;
  nb::object etcd_watch_timeout = nb::none();  // timedelta
  std::optional<bool> use_etcd;
};

std::uint16_t port_of(nb::handle value, const char* what) {
  const nb::object index = nb::steal(PyNumber_Index(value.ptr()));
  PyErr_Clear();
  const long long port = index.is_valid() ? PyLong_AsLongLong(index.ptr()) : -1;
  PyErr_Clear();
  if (port >= 0 && port <= 65535) return static_cast<std::uint16_t>(port);
  const std::string text =
      std::string(what) + " is " + nb::repr(value).c_str() + "; an integer from 0 to 65535 is needed";
  if (index.is_valid()) throw nb::value_error(text.c_str());
  throw nb::type_error(text.c_str());
}

// Runs without the GIL.
template <typename Call>
auto free_of_gil(Call&& call) {
  const WithoutGil nogil;
  return call();
}

nb::list kind_names(const std::vector<MemType>& mems) {
  nb::list names;
  for (const MemType mem : mems) names.append(kKindNames[static_cast<int>(mem)]);
  return names;
}
nb::dict dict_of(const Params& params) {
  nb::dict dict;
  for (const auto& [key, value] : params) dict[str_of(key)] = str_of(value);
  return dict;
}
Params params_of(const nb::dict& dict) {
  Params params;
  for (auto [key, value] : dict) params[text_of(key, "a parameter's name")] = text_of(value, "a parameter's value");
  return params;
}
std::optional<std::string> message_of(nb::handle message) {
  if (message.is_none()) return std::nullopt;
  std::string text = payload_of(message, "a notification");
  if (text.empty()) return std::nullopt;
  return text;
}

std::unique_ptr<Agent> make_agent(nb::handle name, const Config& config) {
  AgentConfig native;
  native.backends.clear();
  native.enable_prog_thread = config.use_prog_thread;
  native.enable_listen = config.use_listen_thread;
  native.listen_port = config.listen_port;
  native.capture_telemetry = config.capture_telemetry;
  native.use_etcd = config.use_etcd;
  if (!config.etcd_watch_timeout.is_none())
    native.etcd_watch_timeout = std::chrono::microseconds(
        static_cast<std::int64_t>(nb::cast<double>(config.etcd_watch_timeout.attr("total_seconds")()) * 1e6));
  std::string text = text_of(name, "the agent's name");
  try {
    return free_of_gil([&] { return std::make_unique<Agent>(std::move(text), std::move(native)); });
  } catch (const Error& error) {
    throw std::runtime_error(error.reason());
  }
}

// The backend's description by canonical name or alias; nullopt when there is none that can be created here.
std::optional<BackendInfo> usable_backend(const std::string& name) {
  auto info = describeBackend(name);
  if (info && !info->available) info.reset();
  return info;
}

nb::dict describe(const BackendInfo& info) {
  nb::dict line;
  line["available"] = info.available;
  line["reason"] = str_of(info.reason);
  line["mem_types"] = kind_names(info.mems);
  line["remote"] = info.remote;
  line["local"] = info.local;
  line["notif"] = info.notif;
  line["params"] = dict_of(info.params);
  return line;
}

// Given by nixl._bindings when it is imported and never freed: calls may come while the interpreter ends.
constexpr int kLowestStatus = -12;
PyObject* g_statuses[14] = {};  // members of nixl_status_t from -12 to 1
PyObject* g_make_error = nullptr;

nb::object status_of(int value) {
  return nb::borrow(g_statuses[value - kLowestStatus]);
}
nb::object status_of(XferState state) {
  return status_of(static_cast<int>(state));
}

// Runs without the GIL; NIXL_SUCCESS unless it throws.
template <typename Call>
nb::object done(Call&& call) {
  free_of_gil(call);
  return status_of(0);
}

// In short turns, so that Python's signal handlers run: Ctrl-C ends the wait.
XferState wait_for(Agent& agent, Handle handle, double seconds) {
  using std::chrono::nanoseconds, std::chrono::steady_clock;
  const auto limit = nanoseconds(seconds > 0 ? static_cast<std::int64_t>(std::min(seconds, 1e9) * 1e9) : 0);
  const auto end = steady_clock::now() + limit;
  for (;;) {
    const nanoseconds turn = std::min<nanoseconds>(end - steady_clock::now(), std::chrono::milliseconds(100));
    const XferState state = free_of_gil([&] { return agent.wait(handle, std::max(turn, nanoseconds(0))); });
    if (state != XferState::PROC || steady_clock::now() >= end) return state;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

void bind_transfers(nb::class_<Agent>& agent) {
  agent
      .def(
          "prepXferDlist",
          [](Agent& self, nb::handle name, const XferList& list, const Ids& backends) {
            const std::string peer = text_of(name, "the agent's name");
            return free_of_gil([&] { return self.prepareDescs(peer, list.descs, backends); });
          },
          "agent_name"_a.none(), "descs"_a, "backend"_a = Ids{})
      .def(
          "prepXferDlist",
          [](Agent& self, const XferList& list, const Ids& backends) {
            return free_of_gil([&] { return self.prepareDescs("", list.descs, backends); });
          },
          "descs"_a, "backend"_a = Ids{})
      .def(
          "makeXferReq",
          [](Agent& self, OpType op, Handle local, nb::handle local_indices, Handle remote, nb::handle remote_indices,
             nb::handle notif, const Ids& backends, bool skip_merge) {
            const IndexRun mine(local_indices), theirs(remote_indices);
            auto message = message_of(notif);
            return free_of_gil([&] {
              return self.makeTransfer(op, local, mine.get(), remote, theirs.get(), std::move(message), backends,
                                       !skip_merge);
            });
          },
          "operation"_a, "local_side"_a, "local_indices"_a.none(), "remote_side"_a, "remote_indices"_a.none(),
          "notif_msg"_a.none() = "", "backend"_a = Ids{}, "skip_desc_merg"_a = false)
      .def(
          "createXferReq",
          [](Agent& self, OpType op, const XferList& local, const XferList& remote, nb::handle name, nb::handle notif,
             const Ids& backends) {
            const std::string peer = text_of(name, "the agent's name");
            auto message = message_of(notif);
            return free_of_gil(
                [&] { return self.makeTransfer(op, local.descs, remote.descs, peer, std::move(message), backends); });
          },
          "operation"_a, "local_descs"_a, "remote_descs"_a, "remote_agent"_a.none(), "notif_msg"_a.none() = "",
          "backend"_a = Ids{})
      .def(
          "estimateXferCost",
          [](Agent& self, Handle handle) {
            const CostEstimate cost = free_of_gil([&] { return self.estimateCost(handle); });
            return nb::make_tuple(cost.duration_us, cost.error_margin_us, 0);
          },
          "req_handle"_a)
      .def(
          "postXferReq",
          [](Agent& self, Handle handle, nb::handle notif) {
            const auto message = message_of(notif);
            return status_of(free_of_gil([&] { return self.post(handle, message ? &*message : nullptr); }));
          },
          "reqh"_a, "notif_msg"_a.none() = "")
      .def(
          "getXferStatus",
          [](Agent& self, Handle handle) { return status_of(free_of_gil([&] { return self.check(handle); })); },
          "reqh"_a)
      .def(
          "waitXferReq",
          [](Agent& self, Handle handle, double seconds) { return status_of(wait_for(self, handle, seconds)); },
          "reqh"_a, "seconds"_a)
      .def(
          "cancelXferReq", [](Agent& self, Handle handle) { free_of_gil([&] { self.cancel(handle); }); }, "reqh"_a)
      .def(
          "getXferTelemetry",
          [](Agent& self, Handle handle) { return free_of_gil([&] { return self.telemetry(handle); }); }, "reqh"_a)
      .def(
          "queryXferBackend",
          [](Agent& self, Handle handle) { return free_of_gil([&] { return self.backendOf(handle); }); }, "reqh"_a)
      .def(
          "queryXferPath", [](Agent& self, Handle handle) { return free_of_gil([&] { return self.pathOf(handle); }); },
          "reqh"_a)
      .def(
          "releaseXferReq", [](Agent& self, Handle handle) { return done([&] { self.release(handle); }); }, "reqh"_a)
      .def(
          "releasedDlistH", [](Agent& self, Handle handle) { return done([&] { self.releaseDescs(handle); }); },
          "handle"_a)
      .def(
          "prepMemView",
          [](Agent& self, const XferList& list, const Ids& backends) {
            return self.openView("", list.descs, backends);
          },
          "dlist"_a, "backends"_a = Ids{})
      .def(
          "prepMemView",
          [](Agent& self, const RemoteList& list, const Ids& backends) {
            return self.openView(list.descs.text(0), list.descs, backends);
          },
          "dlist"_a, "backends"_a = Ids{})
      .def(
          "releaseMemView", [](Agent&, Handle) {}, "mvh"_a);
}

void bind_exchange(nb::class_<Agent>& agent) {
  agent.def("getLocalMD", [](Agent& self) { return bytes_of(free_of_gil([&] { return self.getMetadata(); })); })
      .def(
          "getLocalPartialMD",
          [](Agent& self, const RegList& list, bool connections, const Ids& backends) {
            return bytes_of(free_of_gil([&] { return self.partialMetadata(list.descs, connections, backends); }));
          },
          "descs"_a, "inc_conn_info"_a = false, "backends"_a = Ids{})
      .def(
          "loadRemoteMD",
          [](Agent& self, nb::handle metadata) {
            const std::string bytes = payload_of(metadata, "metadata");
            return bytes_of(free_of_gil([&] { return self.addRemoteAgent(bytes); }));
          },
          "metadata"_a.none())
      .def(
          "invalidateRemoteMD",
          [](Agent& self, nb::handle name) {
            const std::string peer = text_of(name, "the agent's name");
            return status_of(free_of_gil([&]() -> int {
              try {
                const bool known = self.checkRemoteMetadata(peer);
                self.removeRemoteAgent(peer);
                return known ? 0 : -4;
              } catch (const Error& error) {
                return error.code();
              }
            }));
          },
          "agent"_a.none())
      .def(
          "sendLocalMD",
          [](Agent& self, const std::string& ip, nb::handle port) {
            const std::uint16_t at = port_of(port, "port");
            return done([&] { self.sendLocalMetadata(ip, at); });
          },
          "ip_addr"_a = "", "port"_a = 0)
      .def(
          "sendLocalPartialMD",
          [](Agent& self, const RegList& list, bool connections, const Ids& backends, const std::string& ip,
             nb::handle port, const std::string& label) {
            const std::uint16_t at = port_of(port, "port");
            return done([&] { self.sendPartialMetadata(list.descs, connections, backends, ip, at, label); });
          },
          "descs"_a, "inc_conn_info"_a = false, "backends"_a = Ids{}, "ip_addr"_a = "", "port"_a = 0, "label"_a = "")
      .def(
          "fetchRemoteMD",
          [](Agent& self, nb::handle name, const std::string& ip, nb::handle port, const std::string& label) {
            const std::string peer = text_of(name, "the agent's name");
            const std::uint16_t at = port_of(port, "port");
            return done([&] { self.fetchLabelled(peer, ip, at, label); });
          },
          "remote_agent"_a.none(), "ip_addr"_a = "", "port"_a = 0, "label"_a = "")
      .def(
          "invalidateLocalMD",
          [](Agent& self, const std::string& ip, nb::handle port) {
            const std::uint16_t at = port_of(port, "port");
            return done([&] { self.invalidateLocalMetadata(ip, at); });
          },
          "ip_addr"_a = "", "port"_a = 0)
      .def(
          "checkRemoteMD",
          [](Agent& self, nb::handle name, const XferList& list) {
            const std::string peer = text_of(name, "the agent's name");
            return status_of(free_of_gil([&]() -> int {
              try {
                self.requirePeer(peer, &list.descs);
                return 0;
              } catch (const Error& error) {
                return error.code();
              }
            }));
          },
          "name"_a.none(), "descs"_a)
      .def(
          "makeConnection",
          [](Agent& self, nb::handle name, const Ids& backends) {
            const std::string peer = text_of(name, "the agent's name");
            return done([&] { self.connect(peer, backends, std::chrono::seconds(10)); });
          },
          "remote_agent"_a.none(), "backends"_a = Ids{})
      .def(
          "getNotifs",
          [](Agent& self, nb::dict map, const Ids& backends) {
            for (auto& [sender, message] : free_of_gil([&] { return self.drainNotifs(backends); })) {
              const nb::str key = str_of(sender);
              if (!map.contains(key)) map[key] = nb::list();
              nb::cast<nb::list>(map[key]).append(bytes_of(message));
            }
            return map;
          },
          "notif_map"_a, "backends"_a = Ids{})
      .def(
          "genNotif",
          [](Agent& self, nb::handle name, nb::handle message, const Ids& backends) {
            const std::string peer = text_of(name, "the agent's name"), text = payload_of(message, "a notification");
            return done([&] { self.notify(peer, text, backends); });
          },
          "remote_agent"_a.none(), "msg"_a.none(), "backends"_a = Ids{})
      .def("eventFd", [](Agent& self) { return free_of_gil([&] { return self.eventFd(); }); })
      .def("getListenPort", [](Agent& self) { return self.listenPort(); });
}

void bind_backends(nb::class_<Agent>& agent) {
  agent.def("getAvailPlugins", [](Agent& self) { return free_of_gil([&] { return self.pluginList(); }); })
      .def(
          "getPluginParams",
          [](Agent&, const std::string& type) {
            const auto info = free_of_gil([&] { return usable_backend(type); });
            if (!info) throw Error(-4, "backend '" + type + "' is not available");
            return nb::make_tuple(info->lists_params ? dict_of(info->params) : nb::dict(), kind_names(info->mems));
          },
          "type"_a)
      .def(
          "getBackendParams",
          [](Agent& self, Agent::BackendId id) {
            return nb::make_tuple(dict_of(self.backendParams(id)), kind_names(self.backendMems(id)));
          },
          "backend"_a)
      .def(
          "createBackend",
          [](Agent& self, const std::string& type, const nb::dict& params) {
            const Params native = params_of(params);
            return free_of_gil([&] { return self.addBackend(type, native); });
          },
          "type"_a, "params"_a)
      .def(
          "registerMem",
          [](Agent& self, const RegList& list, const Ids& backends) {
            return done([&] { self.registerDescs(list.descs, backends); });
          },
          "descs"_a, "backends"_a = Ids{})
      .def(
          "deregisterMem",
          [](Agent& self, const RegList& list, const Ids& backends) {
            return done([&] { self.deregisterDescs(list.descs, backends); });
          },
          "descs"_a, "backends"_a = Ids{})
      .def(
          "queryMem",
          [](Agent& self, const RegList& list, Agent::BackendId id) {
            const auto answers = free_of_gil([&] { return self.queryMemory(list.descs, id); });
            nb::list out;
            for (const auto& answer : answers) out.append(answer ? nb::object(dict_of(*answer)) : nb::none());
            return out;
          },
          "descs"_a, "backend"_a);
}

}  // namespace

nb::object error_object(const Error& error) {
  return nb::borrow(g_make_error)(error.code(), str_of(error.reason()));
}

void bind_agent(nb::module_& module) {
  nb::enum_<OpType>(module, "nixl_xfer_op_t", nb::is_arithmetic())
      .value("NIXL_READ", OpType::READ)
      .value("NIXL_WRITE", OpType::WRITE)
      .export_values();
  nb::class_<XferTelemetry>(module, "nixlXferTelemetry")
      .def(nb::init<>())
      .def_ro("startTime", &XferTelemetry::start_us)
      .def_ro("postDuration", &XferTelemetry::post_us)
      .def_ro("xferDuration", &XferTelemetry::transfer_us)
      .def_ro("totalBytes", &XferTelemetry::total_bytes)
      .def_ro("descCount", &XferTelemetry::desc_count)
      .def_ro("backendName", &XferTelemetry::backend);
  nb::class_<Config>(module, "nixlAgentConfig")
      .def(
          "__init__",
          [](Config* self, bool prog, bool listen, nb::handle port, nb::object sync, std::uint64_t workers,
             std::uint64_t pthr, std::uint64_t lthr, bool telemetry) {
            const nb::object timeout = nb::module_::import_("datetime").attr("timedelta")("seconds"_a = 5);
            new (self) Config{
                prog,    listen,      port_of(port, "listenPort"), std::move(sync), workers, pthr, lthr, telemetry,
                timeout, std::nullopt};
          },
          "useProgThread"_a = true, "useListenThread"_a = false, "listenPort"_a = 8888, "syncMode"_a = 0,
          "num_workers"_a = 1, "pthrDelay"_a = 0, "lthrDelay"_a = 100'000, "captureTelemetry"_a = false)
      .def_rw("useProgThread", &Config::use_prog_thread)
      .def_rw("useListenThread", &Config::use_listen_thread)
      .def_prop_rw(
          "listenPort", [](const Config& self) { return self.listen_port; },
          [](Config& self, nb::handle port) { self.listen_port = port_of(port, "listenPort"); }, nb::arg().none())
      .def_rw("syncMode", &Config::sync_mode)
      .def_rw("captureTelemetry", &Config::capture_telemetry)
      .def_rw("pthrDelay", &Config::pthr_delay)
      .def_rw("lthrDelay", &Config::lthr_delay)
      .def_rw("etcdWatchTimeout", &Config::etcd_watch_timeout)
      .def_rw("useEtcd", &Config::use_etcd, nb::arg().none());
  nb::class_<Agent> agent(module, "nixlAgent", nb::dynamic_attr(), nb::is_weak_referenceable());
  agent.def(nb::new_([](nb::handle name, const Config& config) { return make_agent(name, config); }), "name"_a.none(),
            "config"_a);
  bind_backends(agent);
  bind_transfers(agent);
  bind_exchange(agent);

  // Gives back the class of statuses in force, that of the first call.
  module.def("set_classes", [](nb::object status_class, nb::object make_error) {
    if (g_make_error) return nb::borrow(reinterpret_cast<PyObject*>(Py_TYPE(g_statuses[0])));
    for (int value = kLowestStatus; value <= 1; ++value)
      g_statuses[value - kLowestStatus] = status_class(value).release().ptr();
    g_make_error = make_error.release().ptr();
    return status_class;
  });
  module.def("plugin_report", [] {
    nb::dict report;
    for (const BackendInfo& info : free_of_gil([] { return listBackends(); }))
      report[nb::str(info.name.c_str())] = describe(info);
    return report;
  });
  module.def("plugin_details", [] {  // name: (module file, parameter that num_threads sets)
    nb::dict details;
    for (const BackendInfo& info : free_of_gil([] { return listBackends(); }))
      details[nb::str(info.name.c_str())] = nb::make_tuple(info.file, info.threads_param);
    return details;
  });
  module.def("canonical_backend", [](const std::string& name) { return canonicalBackend(name); });
  module.def("library_directory", [] { return libraryDirectory(); });
  module.def("plugin_directory", [] { return pluginDirectory(); });
  module.def("version", [] { return std::string(version()); });
}

}  // namespace nixl::python

NB_MODULE(_native, module) {
  namespace nb = nanobind;
  // Imported again after sys.modules was cleaned: types are made once in a process, so the module becomes the first one's double.
  static PyObject* first = nullptr;
  if (first) {
    if (PyDict_Merge(PyModule_GetDict(module.ptr()), PyModule_GetDict(first), 0) != 0) throw nb::python_error();
    return;
  }
  first = nb::object(module).release().ptr();
  nb::set_leak_warnings(false);  // agents may live until the interpreter ends
  nb::register_exception_translator([](const std::exception_ptr& raised, void*) {
    try {
      std::rethrow_exception(raised);
    } catch (const nixl::Error& error) {
      const nb::object made = nixl::python::error_object(error);
      PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
    }
  });
  nixl::python::bind_descs(module);
  nixl::python::bind_agent(module);
}
