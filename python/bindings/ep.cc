// nixl_ep._native: nixl::ep::Buffer with addresses as integers. Tensors are looked at in Python; no torch here.
#include "nixl/ep.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <exception>
#include <utility>

#include "gil.h"
#include "nixl/version.h"
#include "output_pool.h"

namespace nb = nanobind;
using namespace nixl::ep;
using nb::literals::operator""_a;
using Address = std::uintptr_t;

namespace {

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// An exception that is no error but asks to leave (KeyboardInterrupt, SystemExit), raised while a store of this thread's
// connect ran Python; for the caller of connect.
thread_local std::exception_ptr leave_request;

// A store written in Python: an object with set, wait, get, remove. Used by the thread inside connect(), which holds no GIL.
class PythonStore final : public Store {
 public:
  explicit PythonStore(nb::object object) : object_(std::move(object)) {}
  ~PythonStore() override {
    const nb::gil_scoped_acquire gil;
    object_.reset();
  }
  void set(const std::string& key, const std::string& value) override {
    call([&] { object_.attr("set")(key, nb::bytes(value.data(), value.size())); });
  }
  bool wait(const std::string& key, std::int64_t timeout_ms) override {
    return call([&] { return nb::cast<bool>(object_.attr("wait")(key, timeout_ms)); });
  }
  std::string get(const std::string& key) override {
    return call([&] {
      const nb::bytes value = nb::cast<nb::bytes>(object_.attr("get")(key));
      return std::string(value.c_str(), value.size());
    });
  }
  void remove(const std::string& key) override {
    call([&] { object_.attr("remove")(key); });
  }

 private:
  template <typename F>
  static auto call(F f) -> decltype(f()) {
    const nb::gil_scoped_acquire gil;
    try {
      return f();
    } catch (const nb::python_error& error) {  // without the traceback, which would end up in the caller's message
      if (!error.matches(PyExc_Exception)) leave_request = std::current_exception();
      throw std::runtime_error(nb::cast<std::string>(nb::str(error.value())));
    }
  }
  nb::object object_;
};

// Bytes as an array with strides in elements of `item` bytes; `owner` lives as long as the array.
nb::object array(void* data, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides, int item,
                 Device device, int device_id, nb::handle owner) {
  const std::vector<size_t> sizes(shape.begin(), shape.end());
  const nb::dlpack::dtype type{static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), static_cast<uint8_t>(8 * item), 1};
  return nb::cast(nb::ndarray<>(data, sizes.size(), sizes.data(), owner, strides.data(), type,
                                device == Device::kCuda ? nb::device::cuda::value : nb::device::cpu::value, device_id));
}

// What keeps a view's memory, as an owner for `array`.
nb::capsule keep(const View& view) {
  return nb::capsule(new std::shared_ptr<const void>(view.owner),
                     [](void* raw) noexcept { delete static_cast<std::shared_ptr<const void>*>(raw); });
}

nb::object output_block(std::size_t bytes) {
  struct Block {
    void* data;
    std::size_t bytes;
  };
  Block* block = new Block{OutputPool::instance().take(bytes), bytes};
  nb::capsule owner(block, [](void* raw) noexcept {
    Block* mine = static_cast<Block*>(raw);
    OutputPool::instance().give(mine->data, mine->bytes);
    delete mine;
  });
  return array(block->data, {static_cast<std::int64_t>(bytes)}, {1}, 1, Device::kCpu, 0, owner);
}

std::vector<int> connect(Buffer& self, const std::vector<int>& ranks, bool activate) {
  leave_request = nullptr;
  std::exception_ptr failure;
  std::vector<int> connected;
  try {
    const nixl::python::WithoutGil released;
    connected = self.connect(ranks, activate);
  } catch (const Error&) {
    failure = std::current_exception();
  }
  if (leave_request) std::rethrow_exception(std::exchange(leave_request, nullptr));
  if (failure) std::rethrow_exception(failure);
  return connected;
}

enum class Run : int { kWhole = 0, kSend = 1, kReceive = 2 };

void run_dispatch(Buffer& self, int run, const Dispatch& args) {
  switch (static_cast<Run>(run)) {
    case Run::kWhole:
      return self.dispatch(args);
    case Run::kSend:
      return self.dispatch_send(args);
    case Run::kReceive:
      return self.dispatch_recv(args);
  }
}

void run_combine(Buffer& self, int run, const CombineArgs& args) {
  switch (static_cast<Run>(run)) {
    case Run::kWhole:
      return self.combine(args);
    case Run::kSend:
      return self.combine_send(args);
    case Run::kReceive:
      return self.combine_recv(args);
  }
}

void bind_operations(nb::module_& m) {
  nb::class_<Dispatch>(m, "Dispatch")
      .def("__init__",
           [](Dispatch* self, Address x, std::int64_t num_tokens, std::int64_t hidden, Address topk_idx, int topk,
              int index_bytes, Address topk_weights, std::int64_t max_tokens, int num_ranks, int payload, Address stats,
              Address wait_cost, Address stream) {
             new (self) Dispatch();
             self->x = pointer(x);
             self->num_tokens = num_tokens;
             self->hidden = hidden;
             self->topk_idx = pointer(topk_idx);
             self->topk = topk;
             self->index_bytes = index_bytes;
             self->topk_weights = pointer<float>(topk_weights);
             self->max_tokens = max_tokens;
             self->num_ranks = num_ranks;
             self->payload = static_cast<Payload>(payload);
             self->recv_stats = pointer<std::int32_t>(stats);
             self->wait_cost = pointer<std::int64_t>(wait_cost);
             self->stream = pointer(stream);
           })
      .def("outputs", [](Dispatch& self, Address x, Address scales, Address count, Address src_info,
                         Address layout_range, Address weights, Address places, Address records) {
        self.recv_x = pointer(x);
        self.recv_scales = pointer(scales);
        self.recv_count = pointer<std::int32_t>(count);
        self.src_info = pointer<std::int32_t>(src_info);
        self.layout_range = pointer<std::int64_t>(layout_range);
        self.recv_weights = pointer<float>(weights);
        self.recv_places = pointer<std::uint8_t>(places);
        self.records = pointer(records);
      });
  nb::class_<CombineArgs>(m, "Combine")
      .def("__init__",
           [](CombineArgs* self, Address x, std::int64_t num_tokens, std::int64_t hidden, Address topk_idx, int topk,
              int index_bytes, Address topk_weights, std::int64_t max_tokens, int num_ranks, Address out,
              Address wait_cost, Address stream) {
             new (self) CombineArgs();
             self->x = pointer(x);
             self->num_tokens = num_tokens;
             self->hidden = hidden;
             self->topk_idx = pointer(topk_idx);
             self->topk = topk;
             self->index_bytes = index_bytes;
             self->topk_weights = pointer<float>(topk_weights);
             self->max_tokens = max_tokens;
             self->num_ranks = num_ranks;
             self->out = pointer(out);
             self->wait_cost = pointer<std::int64_t>(wait_cost);
             self->stream = pointer(stream);
           })
      .def("handle",
           [](CombineArgs& self, Address src_info, Address layout_range, Address weights, Address places,
              Address records) {
             self.src_info = pointer<std::int32_t>(src_info);
             self.layout_range = pointer<std::int64_t>(layout_range);
             self.recv_weights = pointer<float>(weights);
             self.recv_places = pointer<std::uint8_t>(places);
             self.records = pointer(records);
           })
      .def("modes", [](CombineArgs& self, bool zero_copy, bool logfmt, bool sends_only) {
        self.zero_copy = zero_copy;
        self.logfmt = logfmt;
        self.sends_only = sends_only;
      });
}

void bind_buffer(nb::module_& m) {
  const auto free = nb::call_guard<nixl::python::WithoutGil>();
  nb::class_<Buffer>(m, "Buffer")
      .def("__init__",
           [](Buffer* self, int rank, int device, int combine, std::int64_t timeout_ms, std::int64_t connect_timeout_ms,
              bool nvlink) {
             new (self) Buffer(Options{rank, static_cast<Device>(device), static_cast<Combine>(combine), timeout_ms,
                                       connect_timeout_ms, nvlink});
           })
      .def("update_memory", &Buffer::update_memory, free)
      .def(
          "set_store",
          [](Buffer& self, nb::object store) {
            std::shared_ptr<Store> inside;
            if (!store.is_none()) inside = std::make_shared<PythonStore>(std::move(store));
            const nixl::python::WithoutGil released;
            self.set_store(std::move(inside));
          },
          "store"_a.none())
      .def("connect", &connect)
      .def("disconnect", &Buffer::disconnect, free)
      .def("destroy", &Buffer::destroy, free)
      .def("dispatch", &run_dispatch, free)
      .def("combine", &run_combine, free)
      .def(
          "barrier", [](Buffer& self, Address stream) { self.barrier(pointer(stream)); }, free)
      .def(
          "mask",
          [](Buffer& self, const std::vector<int>& ranks, bool masked, Address stream) {
            self.mask(ranks, masked, pointer(stream));
          },
          free)
      .def(
          "clean_masks", [](Buffer& self, Address stream) { self.clean_masks(pointer(stream)); }, free)
      .def(
          "query_masks",
          [](const Buffer& self, Address out, Address stream) {
            self.query_masks(pointer<std::int32_t>(out), pointer(stream));
          },
          free)
      .def("active_ranks", &Buffer::active_ranks)
      .def("connected_ranks", &Buffer::connected_ranks)
      .def("active_rank_bound", &Buffer::active_rank_bound)
      .def("take_input_error", &Buffer::take_input_error)
      .def("incarnation", &Buffer::incarnation)
      .def("take_faults",
           [](Buffer& self) {
             nb::list out;
             for (const Fault& f : self.take_faults())
               out.append(nb::make_tuple(f.rank, f.operation, static_cast<int>(f.phase), f.expected, f.seen));
             return out;
           })
      .def("next_combine_buffer",
           [](Buffer& self, std::int64_t max_tokens, std::int64_t hidden, int num_ranks, int device, int device_id) {
             const View v = self.next_combine_buffer(max_tokens, hidden, num_ranks);
             return array(v.data, {v.shape[0], v.shape[1], v.shape[2]}, {v.stride[0], v.stride[1], v.stride[2]}, 2,
                          static_cast<Device>(device), device_id, keep(v));
           })
      .def("data_memory",
           [](const Buffer& self, std::int64_t offset, std::int64_t bytes, int device, int device_id) {
             const View v = self.data_memory();
             return array(static_cast<char*>(v.data) + offset, {bytes}, {1}, 1, static_cast<Device>(device), device_id,
                          keep(v));
           })
      .def("data_bytes", [](const Buffer& self) { return self.data_memory().shape[0]; })
      .def("fault_view", [](const Buffer& self, int device, int device_id) {
        const View v = self.fault_view();
        return array(v.data, {v.shape[0]}, {1}, 4, static_cast<Device>(device), device_id, keep(v));
      });
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // an undestroyed buffer at interpreter exit is allowed
  m.def("version", &nixl::version);
  m.def("size_hint", &size_hint);
  m.def("record_bytes", [](int device, std::int64_t max_tokens, int topk, int num_ranks) {
    return record_bytes(static_cast<Device>(device), max_tokens, topk, num_ranks);
  });
  m.def("cuda_unavailable_reason", &cuda_unavailable_reason);
  m.def("output_block", &output_block);
  bind_operations(m);
  bind_buffer(m);
}
