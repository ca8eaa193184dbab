// IndexRun: a one-dimensional run of indices, from a NumPy array of any integer type or a sequence of integers. Made and destroyed
// with the GIL held; get() needs none and is valid as long as the run.
#pragma once
#include <nanobind/nanobind.h>
#include <nixl/agent.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace nixl::python {
namespace nb = nanobind;

class IndexRun {
 public:
  explicit IndexRun(nb::handle source) {
    PyObject* object = source.ptr();
    if (PyObject_CheckBuffer(object) && read_buffer(object)) return;
    const nb::object items =
        nb::steal(PySequence_Fast(object, "indices must be a list of integers or a one-dimensional array"));
    if (!items.is_valid()) throw nb::python_error();
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
    copy_.resize(static_cast<std::size_t>(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
      copy_[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.ptr(), i));
      if (copy_[i] == -1 && PyErr_Occurred()) throw nb::python_error();
    }
  }
  ~IndexRun() {
    if (view_.obj) PyBuffer_Release(&view_);
  }
  IndexRun(const IndexRun&) = delete;
  Agent::Indices get() const {
    if (view_.obj) return {static_cast<const std::int64_t*>(view_.buf), static_cast<std::size_t>(view_.len / 8)};
    return {copy_.data(), copy_.size()};
  }

 private:
  template <typename T>
  void convert(const char* from, Py_ssize_t count, Py_ssize_t step) {
    copy_.resize(static_cast<std::size_t>(count));
    if (step == sizeof(T))  // a loop that vectorises
      for (Py_ssize_t i = 0; i < count; ++i) copy_[i] = static_cast<std::int64_t>(reinterpret_cast<const T*>(from)[i]);
    else
      for (Py_ssize_t i = 0; i < count; ++i)
        copy_[i] = static_cast<std::int64_t>(*reinterpret_cast<const T*>(from + i * step));
  }
  // false: the object is better read as a sequence.
  bool read_buffer(PyObject* object) {
    if (PyObject_GetBuffer(object, &view_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
      PyErr_Clear();
      view_.obj = nullptr;
      return false;
    }
    const int ndim = view_.ndim;
    const char format = view_.format && view_.format[1] == 0 ? view_.format[0] : '?';
    if (ndim != 1 || !std::strchr("bBhHiIlLqQ", format)) {
      const std::string seen = view_.format ? view_.format : "B";
      PyBuffer_Release(&view_);
      view_.obj = nullptr;
      throw nb::value_error(
          (ndim != 1 ? "indices must be one-dimensional; the array has " + std::to_string(ndim) + " dimensions"
                     : "indices must be integers; the array's format is '" + seen + "'")
              .c_str());
    }
    const Py_ssize_t count = view_.shape[0], step = view_.strides[0];
    if (view_.itemsize == 8 && step == 8)
      return true;  // used in place; huge unsigned values are out of range all the same
    const char* from = static_cast<const char*>(view_.buf);
    const bool is_signed = std::strchr("bhilq", format) != nullptr;
    switch (view_.itemsize) {
      case 1:
        is_signed ? convert<std::int8_t>(from, count, step) : convert<std::uint8_t>(from, count, step);
        break;
      case 2:
        is_signed ? convert<std::int16_t>(from, count, step) : convert<std::uint16_t>(from, count, step);
        break;
      case 4:
        is_signed ? convert<std::int32_t>(from, count, step) : convert<std::uint32_t>(from, count, step);
        break;
      default:
        convert<std::int64_t>(from, count, step);
        break;
    }
    PyBuffer_Release(&view_);
    view_.obj = nullptr;
    return true;
  }
  Py_buffer view_{};
  std::vector<std::int64_t, Uninitialised<std::int64_t>> copy_;
};

}  // namespace nixl::python
