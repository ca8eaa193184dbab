#include "descs.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string_view>

#include "gil.h"

namespace nixl::python {
using nb::literals::operator""_a;

std::string text_of(nb::handle value, const char* what) {
  if (PyBytes_Check(value.ptr()))
    return {PyBytes_AS_STRING(value.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(value.ptr()))};
  if (PyUnicode_Check(value.ptr())) {
    Py_ssize_t size = 0;
    if (const char* text = PyUnicode_AsUTF8AndSize(value.ptr(), &size)) return {text, static_cast<std::size_t>(size)};
    PyErr_Clear();
    const nb::object bytes = nb::steal(PyUnicode_AsEncodedString(value.ptr(), "utf-8", "surrogateescape"));
    if (!bytes.is_valid()) throw nb::python_error();
    return {PyBytes_AS_STRING(bytes.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(bytes.ptr()))};
  }
  throw nb::type_error((std::string(what) + " must be str or bytes, not " + Py_TYPE(value.ptr())->tp_name).c_str());
}

std::string payload_of(nb::handle value, const char* what) {
  if (!PyByteArray_Check(value.ptr()) && !PyMemoryView_Check(value.ptr())) return text_of(value, what);
  Py_buffer view;
  if (PyObject_GetBuffer(value.ptr(), &view, PyBUF_SIMPLE) != 0) {
    PyErr_Clear();
    throw nb::type_error((std::string(what) + " must be contiguous; call tobytes() on the memoryview").c_str());
  }
  std::string bytes(static_cast<const char*>(view.buf), static_cast<std::size_t>(view.len));
  PyBuffer_Release(&view);
  return bytes;
}

nb::bytes bytes_of(const std::string& text) {
  return nb::bytes(text.data(), text.size());
}

nb::str str_of(const std::string& text) {
  PyObject* const made = PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape");
  if (!made) throw nb::python_error();
  return nb::steal<nb::str>(made);
}

namespace {

[[noreturn]] void refuse_number(PyObject* value, const char* what) {
  PyErr_Clear();
  const std::string text =
      std::string(what) + " is " + nb::repr(nb::handle(value)).c_str() + "; an integer from 0 to 2**64 - 1 is needed";
  if (PyIndex_Check(value)) throw nb::value_error(text.c_str());
  throw nb::type_error(text.c_str());
}

std::uint64_t number_of(PyObject* value, const char* what) {
  if (PyLong_CheckExact(value)) {
    const unsigned long long number = PyLong_AsUnsignedLongLong(value);
    if (number == static_cast<unsigned long long>(-1) && PyErr_Occurred()) refuse_number(value, what);
    return number;
  }
  const nb::object index = nb::steal(PyNumber_Index(value));  // NumPy's integers, enums
  if (!index.is_valid()) refuse_number(value, what);
  const unsigned long long number = PyLong_AsUnsignedLongLong(index.ptr());
  if (number == static_cast<unsigned long long>(-1) && PyErr_Occurred()) refuse_number(value, what);
  return number;
}

// A two-dimensional C-contiguous buffer of 64-bit integers with `columns` columns.
class Rows {
 public:
  Rows(PyObject* array, Py_ssize_t columns) {
    if (PyObject_GetBuffer(array, &view_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      throw nb::value_error("the array gives no buffer of numbers");
    }
    const char* format = view_.format ? view_.format : "B";
    const bool integers = view_.itemsize == 8 && std::strlen(format) == 1 && std::strchr("lLqQ", format[0]);
    const bool shaped = view_.ndim == 2 && (view_.shape[1] == columns || view_.shape[0] == 0);
    if (!integers || !shaped || !PyBuffer_IsContiguous(&view_, 'C')) {
      const std::string seen = "the array has " + std::to_string(view_.ndim) + " dimensions" +
                               (view_.ndim == 2 ? ", " + std::to_string(view_.shape[1]) + " columns" : "") +
                               ", format '" + format + "'" +
                               (PyBuffer_IsContiguous(&view_, 'C') ? "" : ", not C-contiguous");
      PyBuffer_Release(&view_);
      throw nb::value_error(
          (seen + "; needed: N x " + std::to_string(columns) + ", uint64 or int64, C-contiguous").c_str());
    }
  }
  Rows(const Rows&) = delete;
  ~Rows() { PyBuffer_Release(&view_); }
  const std::uint64_t* data() const { return static_cast<const std::uint64_t*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.shape[0]); }

 private:
  Py_buffer view_{};
};

bool is_array(PyObject* object) {
  return PyObject_CheckBuffer(object) && !PyBytes_Check(object) && !PyByteArray_Check(object);
}

// Entries of a tuple that describes one row.
struct Arity {
  Py_ssize_t least, most;
};
template <typename List>
constexpr Arity kArity{3, 3};
template <>
constexpr Arity kArity<RegList>{3, 4};
template <>
constexpr Arity kArity<RemoteList>{4, 4};

class Tuple {
 public:
  Tuple(PyObject* tuple, Arity arity) : tuple_(tuple) {
    if (!PyTuple_Check(tuple))
      throw nb::type_error((std::string("a descriptor must be a tuple, not ") + Py_TYPE(tuple)->tp_name).c_str());
    if (size() < arity.least || size() > arity.most)
      throw nb::value_error(
          ("a descriptor has " + std::to_string(size()) + " entries; needed: " + std::to_string(arity.most)).c_str());
  }
  Py_ssize_t size() const { return PyTuple_GET_SIZE(tuple_); }
  std::uint64_t number(Py_ssize_t i) const {
    constexpr const char* kNames[] = {"addr of a descriptor", "len of a descriptor", "dev of a descriptor"};
    return number_of(PyTuple_GET_ITEM(tuple_, i), kNames[i]);
  }
  std::string text() const { return text_of(PyTuple_GET_ITEM(tuple_, 3), "the fourth entry of a descriptor"); }

 private:
  PyObject* tuple_;
};

void add_tuple(Descs& descs, PyObject* item, Arity arity) {
  const Tuple tuple(item, arity);
  const std::uint64_t addr = tuple.number(0), len = tuple.number(1), dev = tuple.number(2);
  descs.add(addr, len, dev, tuple.size() == 4 ? tuple.text() : std::string());
}

// A long list of tuples lies scattered over memory: without this every row waits for its tuple and then for its numbers.
void fetch_ahead(PyObject** rows, std::size_t i, std::size_t count) {
  constexpr std::size_t kTuples = 24, kNumbers = 12;
  if (i + kTuples >= count) return;
  __builtin_prefetch(rows[i + kTuples]);
  __builtin_prefetch(reinterpret_cast<char*>(rows[i + kTuples]) + 64);
  PyObject* const near = rows[i + kNumbers];
  if (!PyTuple_CheckExact(near)) return;
  const Py_ssize_t size = std::min<Py_ssize_t>(PyTuple_GET_SIZE(near), 2);
  for (Py_ssize_t k = 0; k < size; ++k) __builtin_prefetch(PyTuple_GET_ITEM(near, k));
}

template <typename List>
Descs read(MemType type, nb::handle content) {
  Descs descs(type);
  PyObject* object = content.ptr();
  if (content.is_none() || PyBool_Check(object)) return descs;  // a bare boolean is the historic "sorted"
  if (PyLong_Check(object)) {
    const std::uint64_t count = number_of(object, "init_size");
    for (Column* column : {&descs.addr, &descs.len, &descs.dev}) *column = Column(count, 0);
    return descs;
  }
  if (is_array(object)) {
    if constexpr (std::is_same_v<List, RemoteList>) {
      throw nb::type_error("remote descriptors are tuples (addr, len, dev, agent)");
    } else {
      const Rows rows(object, 3);
      const WithoutGil nogil;
      descs.addr.assign(rows.data(), rows.size(), 3);
      descs.len.assign(rows.data() + 1, rows.size(), 3);
      descs.dev.assign(rows.data() + 2, rows.size(), 3);
      return descs;
    }
  }
  const nb::object items =
      nb::steal(PySequence_Fast(object, "descriptors must be a number, an array or a list of tuples"));
  if (!items.is_valid()) throw nb::python_error();
  const std::size_t count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
  PyObject** const rows = PySequence_Fast_ITEMS(items.ptr());
  Column::Values addr(count), len(count), dev(count);
  for (std::size_t i = 0; i < count; ++i) {
    fetch_ahead(rows, i, count);
    const Tuple tuple(rows[i], kArity<List>);
    addr[i] = tuple.number(0);
    len[i] = tuple.number(1);
    dev[i] = tuple.number(2);
    if (tuple.size() < 4) continue;
    std::string text = tuple.text();
    if (text.empty()) continue;
    descs.meta.resize(count);
    descs.meta[i] = std::move(text);
  }
  descs.addr = Column(std::move(addr));
  descs.len = Column(std::move(len));
  descs.dev = Column(std::move(dev));
  return descs;
}

Descs read_strided(MemType type, nb::handle array) {
  const Rows rows(array.ptr(), 5);
  Descs descs(type);
  Column* columns[] = {&descs.addr, &descs.len, &descs.dev, &descs.stride, &descs.count};
  for (std::size_t i = 0; i < 5; ++i) columns[i]->assign(rows.data() + i, rows.size(), 5);
  for (std::size_t row = 0; row < descs.rows(); ++row) {
    if (static_cast<std::int64_t>(descs.count[row]) < 1)
      throw nb::value_error(("row " + std::to_string(row) + ": count must be at least 1").c_str());
    if (descs.stride[row] < descs.len[row])
      throw nb::value_error(("row " + std::to_string(row) + ": stride " + std::to_string(descs.stride[row]) +
                             " is below the length " + std::to_string(descs.len[row]))
                                .c_str());
  }
  return descs;
}

std::size_t place(std::uint64_t size, Py_ssize_t index) {
  const Py_ssize_t count = static_cast<Py_ssize_t>(size), at = index < 0 ? index + count : index;
  if (at < 0 || at >= count)
    throw nb::index_error(
        ("index " + std::to_string(index) + " is out of range: the list has " + std::to_string(count) + " descriptors")
            .c_str());
  return static_cast<std::size_t>(at);
}

template <typename List>
nb::tuple item(const List& list, Py_ssize_t index) {
  const Descs& descs = list.descs;
  std::uint64_t block = place(descs.blocks(), index);
  std::size_t row = block;
  if (descs.has_runs()) {
    row = 0;
    while (block >= descs.count[row]) block -= descs.count[row++];
  } else {
    block = 0;
  }
  const std::uint64_t addr = descs.addr[row] + (block ? block * descs.stride[row] : 0);
  if constexpr (std::is_same_v<List, XferList>)
    return nb::make_tuple(addr, descs.len[row], descs.dev[row]);
  else if constexpr (std::is_same_v<List, RegList>)
    return nb::make_tuple(addr, descs.len[row], descs.dev[row], bytes_of(descs.text(row)));
  else
    return nb::make_tuple(addr, descs.len[row], descs.dev[row], str_of(descs.text(row)));
}

void refuse_runs(const Descs& descs) {
  if (descs.has_runs()) throw nb::value_error("a list made from strides cannot be changed");
}

template <typename List>
void add(List& list, nb::handle tuple) {
  refuse_runs(list.descs);
  add_tuple(list.descs, tuple.ptr(), kArity<List>);
}

template <typename List>
void replace(List& list, Py_ssize_t index, nb::handle tuple) {
  refuse_runs(list.descs);
  const std::size_t row = place(list.descs.rows(), index);
  Descs one(list.descs.type);
  add_tuple(one, tuple.ptr(), kArity<List>);
  list.descs.addr.set(row, one.addr[0]);
  list.descs.len.set(row, one.len[0]);
  list.descs.dev.set(row, one.dev[0]);
  if (!list.descs.meta.empty() || !one.meta.empty()) {
    list.descs.meta.resize(list.descs.rows());
    list.descs.meta[row] = one.text(0);
  }
}

template <typename List>
void erase(List& list, Py_ssize_t index) {
  refuse_runs(list.descs);
  const std::size_t row = place(list.descs.rows(), index);
  for (Column* column : {&list.descs.addr, &list.descs.len, &list.descs.dev}) column->erase(row);
  if (!list.descs.meta.empty()) list.descs.meta.erase(list.descs.meta.begin() + static_cast<std::ptrdiff_t>(row));
}

template <typename List>
std::size_t index_of(const List& list, nb::handle tuple) {
  Descs one(list.descs.type);
  add_tuple(one, tuple.ptr(), Arity{3, 4});
  for (std::size_t row = 0; row < list.descs.rows(); ++row)
    if (list.descs.addr[row] == one.addr[0] && list.descs.len[row] == one.len[0] && list.descs.dev[row] == one.dev[0])
      return row;
  throw Error(-4, "the descriptor is not in the list");
}

template <typename List>
std::string print(const List& list, const char* name) {
  std::string out = std::string(name) + " of " + std::to_string(list.descs.rows()) + " rows\n";
  for (std::size_t row = 0; row < list.descs.rows(); ++row) {
    char line[128];
    std::snprintf(line, sizeof line, "  %zu: addr 0x%llx len %llu dev %llu\n", row,
                  static_cast<unsigned long long>(list.descs.addr[row]),
                  static_cast<unsigned long long>(list.descs.len[row]),
                  static_cast<unsigned long long>(list.descs.dev[row]));
    out += line;
  }
  return out;
}

template <typename List>
constexpr std::uint8_t kClass = std::is_same_v<List, XferList>  ? 0
                                : std::is_same_v<List, RegList> ? 1
                                                                : 2;

// Pickles name the class anyway: they go without the bytes that all packed lists begin with.
constexpr std::string_view kMagic = "NIXLDESC";

template <typename List>
Descs unpack(const std::string& bytes) {
  std::uint8_t seen = 0;
  Descs descs = unpackDescs(bytes.data(), bytes.size(), seen);
  if (seen != kClass<List>) throw Error(-5, "the packed list is of another class");
  return descs;
}

template <typename List>
nb::class_<List> bind_list(nb::module_& module, const char* name) {
  nb::class_<List> list(module, name);
  // The same constructor under each of the names that its arguments are known by.
  const auto construct = [](List* self, MemType type, nb::object content, nb::object) {
    new (self) List{read<List>(type, content)};
  };
  for (const char* mem : {"mem", "type"}) {
    list.def("__init__", construct, nb::arg(mem), "init_size"_a = 0, "sorted"_a = false);
    list.def("__init__", construct, nb::arg(mem), "descs"_a, "sorted"_a = false);
  }
  list.def("__getitem__", [](const List& list, Py_ssize_t index) { return item(list, index); })
      .def("__setitem__", [](List& list, Py_ssize_t index, nb::handle tuple) { replace(list, index, tuple); })
      .def("addDesc", [](List& list, nb::handle tuple) { add(list, tuple); })
      .def("append", [](List& list, nb::handle tuple) { add(list, tuple); })
      .def("remDesc", [](List& list, Py_ssize_t index) { erase(list, index); })
      .def("getType", [](const List& list) { return list.descs.type; })
      .def("descCount", [](const List& list) { return list.descs.blocks(); })
      .def("isEmpty", [](const List& list) { return list.descs.rows() == 0; })
      .def("clear", [](List& list) { list.descs = Descs(list.descs.type); })
      .def("print", [name](const List& list) { nb::print(nb::str(print(list, name).c_str())); })
      .def("__len__", [](const List& list) { return list.descs.blocks(); })
      .def("__bool__", [](const List&) { return true; })
      .def(
          "__eq__",
          [](const List& a, nb::handle b) {
            return nb::isinstance<List>(b) && a.descs == nb::cast<const List&>(b).descs;
          },
          nb::arg().none())
      .def("__getstate__",
           [](const List& list) { return bytes_of(packDescs(list.descs, kClass<List>).substr(kMagic.size())); })
      .def("__setstate__",
           [](List& list, nb::bytes state) {
             new (&list) List{unpack<List>(std::string(kMagic) + std::string(state.c_str(), state.size()))};
           })
      .def("pack", [](const List& list) { return bytes_of(packDescs(list.descs, kClass<List>)); })
      .def_static("unpack",
                  [](nb::bytes bytes) { return List{unpack<List>(std::string(bytes.c_str(), bytes.size()))}; });
  return list;
}

}  // namespace

void bind_descs(nb::module_& module) {
  nb::enum_<MemType>(module, "nixl_mem_t", nb::is_arithmetic())
      .value("DRAM_SEG", MemType::DRAM)
      .value("VRAM_SEG", MemType::VRAM)
      .value("BLK_SEG", MemType::BLOCK)
      .value("OBJ_SEG", MemType::OBJECT)
      .value("FILE_SEG", MemType::FILE)
      .export_values();
  bind_list<XferList>(module, "nixlXferDList")
      .def("index", [](const XferList& list, nb::handle tuple) { return index_of(list, tuple); })
      .def_static("from_strided", [](MemType type, nb::handle array) { return XferList{read_strided(type, array)}; });
  bind_list<RegList>(module, "nixlRegDList")
      .def("index", [](const RegList& list, nb::handle tuple) { return index_of(list, tuple); })
      .def("trim", [](const RegList& list) {
        XferList trimmed{list.descs};
        trimmed.descs.meta.clear();
        return trimmed;
      });
  bind_list<RemoteList>(module, "nixlRemoteDList");
  // (class, list): 0 transfer, 1 registration, 2 remote
  module.def("unpack_descs", [](nb::bytes bytes) -> nb::object {
    std::uint8_t list_class = 0;
    Descs descs = unpackDescs(bytes.c_str(), bytes.size(), list_class);
    if (list_class == 0) return nb::cast(XferList{std::move(descs)});
    if (list_class == 1) return nb::cast(RegList{std::move(descs)});
    return nb::cast(RemoteList{std::move(descs)});
  });
}

}  // namespace nixl::python
