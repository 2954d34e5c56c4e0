// The Python module lora_edge._C: a Plan for one layer on one input size, with a launch per op. Addresses, sizes in bytes,
// strides and the stream are plain numbers, so it does not link torch. check.h checks the numbers; shapes, types and devices,
// which they do not show, are checked in lora_edge/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/block.h"
#include "cpu/kernels_of.h"
#include "device.h"
#include "fields.h"
#include "plan.h"

#if !defined(LORA_EDGE_MODULE)
#define LORA_EDGE_MODULE _C
#endif
#if !defined(LORA_EDGE_ARCHITECTURES)
#define LORA_EDGE_ARCHITECTURES ""
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace lora_edge {
namespace {

template <class Fields>
std::vector<std::string> names() {
  std::vector<std::string> found;
  Fields fields{};
  visit([&found](const char* name, auto&) { found.push_back(name); }, fields);
  return found;
}

int last_of(Type) { return static_cast<int>(Type::bf16); }
int last_of(Precision) { return static_cast<int>(Precision::half); }
int last_of(Activation) { return static_cast<int>(Activation::clamp); }

// Fills a Problem from keyword arguments.
class KeywordReader {
 public:
  explicit KeywordReader(const py::dict& given) : given_(given) {}

  void operator()(const char* name, int32_t& field) {
    bool may_be_zero = false;
    for (const char* other : {"batch", "rank", "pad_h", "pad_w", "cores", "bond2", "bond3"}) {
      may_be_zero = may_be_zero || std::strcmp(name, other) == 0;
    }
    field = integer(name, may_be_zero ? 0 : 1, INT32_MAX);
  }

  void operator()(const char* name, float& field) {
    const double value = PyFloat_AsDouble(find(name).ptr());
    if (PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      throw py::type_error(text(name) + "; it must be a number");
    }
    constexpr double most = std::numeric_limits<float>::max();  // above it the cast is undefined
    field = static_cast<float>(std::abs(value) > most ? std::copysign(HUGE_VAL, value) : value);
  }

  template <class Enum>
  void operator()(const char* name, Enum& field) {
    field = static_cast<Enum>(integer(name, 0, last_of(field)));
  }

 private:
  py::handle find(const char* name) const {
    PyObject* value = PyDict_GetItemString(given_.ptr(), name);
    if (value == nullptr) throw py::type_error(std::string("Plan: the field ") + name + " is missing");
    return value;
  }

  std::string text(const char* name) const {
    return std::string("Plan: ") + name + " is " + std::string(py::str(py::repr(find(name))));
  }

  int32_t integer(const char* name, int32_t least, int32_t most) const {
    PyObject* value = find(name).ptr();
    if (!PyLong_Check(value) || PyBool_Check(value)) throw py::type_error(text(name) + "; it must be an int");
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0 || number < least || number > most) {
      throw py::value_error(text(name) + "; it must lie in " + std::to_string(least) + ".." + std::to_string(most));
    }
    return static_cast<int32_t>(number);
  }

  const py::dict& given_;
};

[[noreturn]] void refuse_number(const std::string& what, PyObject* given) {
  throw py::type_error(what + " is " + std::string(py::str(py::repr(given))) + "; it must be an int of at most 64 bits");
}

static_assert(sizeof(long) == 8, "addresses are read as long, which is several times faster than as long long");

bool read_number(PyObject* from, int64_t& number) {
  if (!PyLong_CheckExact(from)) return false;
  int overflow = 0;
  number = PyLong_AsLongAndOverflow(from, &overflow);
  return overflow == 0;
}

int64_t number_of(const char* op, const char* name, py::handle given) {
  int64_t number = 0;
  if (!read_number(given.ptr(), number)) refuse_number(std::string(op) + ": " + name, given.ptr());
  return number;
}

int small_number_of(const char* op, const char* name, py::handle given, int least) {
  const int64_t number = number_of(op, name, given);
  if (number < least || number > INT32_MAX) {
    throw py::value_error(std::string(op) + ": " + name + " is " + std::to_string(number) + "; it must lie in " +
                          std::to_string(least) + ".." + std::to_string(INT32_MAX));
  }
  return static_cast<int>(number);
}

// Calls a visitor with the name of each number in a call's tuple: one per field, and for an address also that of its bytes.
template <class Visit>
struct Numbers {
  Visit visit;

  void operator()(const char* name, int64_t&) { visit(std::string(name)); }
  template <class Element>
  void operator()(const char* name, Element*&) {
    visit(std::string(name)), visit(std::string(name) + "_bytes");
  }
};

// Fills a call's fields from a tuple of their values in the order of `visit`; each address is followed by the number of bytes
// there. Every launch pays for this.
class TupleReader {
 public:
  TupleReader(const char* op, PyObject* values, Place* places) : op_(op), values_(values), place_(places) {}

  void operator()(const char* name, int64_t& field) { read(name, "", field); }

  template <class Element>
  void operator()(const char* name, Element*& field) {
    place_->name = name;
    read(name, "", place_->address), read(name, "_bytes", place_->bytes);
    field = reinterpret_cast<Element*>(static_cast<uintptr_t>(place_->address));
    ++place_;
  }

 private:
  void read(const char* name, const char* ending, int64_t& number) {
    PyObject* value = PyTuple_GET_ITEM(values_, index_);
    if (!read_number(value, number)) {
      refuse_number(std::string(op_) + ": args[" + std::to_string(index_) + "] (" + name + ending + ")", value);
    }
    ++index_;
  }

  const char* op_;
  PyObject* values_;
  Place* place_;
  Py_ssize_t index_ = 0;
};

template <class Call>
std::vector<std::string> number_names() {
  std::vector<std::string> found;
  Call call{};
  auto add = [&found](const std::string& name) { found.push_back(name); };
  visit(Numbers<decltype(add)>{add}, call);
  return found;
}

template <class Call>
Call read_call(const char* op, py::handle args, Place* places) {
  static const Py_ssize_t wanted = static_cast<Py_ssize_t>(number_names<Call>().size());
  Call call{};
  if (!PyTuple_Check(args.ptr())) {
    throw py::type_error(std::string(op) + ": args is a " + Py_TYPE(args.ptr())->tp_name + "; it must be a tuple");
  }
  if (PyTuple_GET_SIZE(args.ptr()) != wanted) {
    throw py::type_error(std::string(op) + ": args has " + std::to_string(PyTuple_GET_SIZE(args.ptr())) +
                         " values; it must have " + std::to_string(wanted) + ", see call_fields(\"" + op + "\")");
  }
  visit(TupleReader(op, args.ptr(), places), call);
  return call;
}

enum class Op { tt_fuse, dora_fuse, tt_block };

constexpr Op kOps[] = {Op::tt_fuse, Op::dora_fuse, Op::tt_block};

const char* name_of(Op op) { return op == Op::tt_fuse ? "tt_fuse" : op == Op::dora_fuse ? "dora_fuse" : "tt_block"; }

class Plan {
 public:
  explicit Plan(const py::kwargs& fields) {
    visit(KeywordReader(fields), problem_);
    const std::vector<std::string> known = names<Problem>();
    for (const auto& item : fields) {
      const std::string name = py::str(item.first);
      bool found = false;
      for (const std::string& other : known) found = found || name == other;
      if (!found) throw py::type_error("Plan: there is no field " + name);
    }
    check_problem(problem_);
    for (const Op op : kOps) {
      if (const char* why = lora_edge::refusal(problem_, name_of(op))) refusal_[static_cast<int>(op)] = why;
    }
    scratch_ = lora_edge::scratch(problem_);
    if (const char* why = cpu::refusal(problem_)) {
      cpu_refusal_ = why;
    } else {
      cpu_scratch_ = cpu::scratch(problem_);
    }
  }

  py::object refusal(const std::string& name) const {
    for (const Op op : kOps) {
      if (name != name_of(op)) continue;
      const std::string& why = refusal_[static_cast<int>(op)];
      return why.empty() ? py::none() : py::object(py::str(why));
    }
    throw py::value_error("refusal: there is no op " + name + "; it must be tt_fuse, dora_fuse or tt_block");
  }

  py::dict scratch() const {
    const Scratch& bytes = scratch_;
    return py::dict("packed_forward"_a = bytes.packed_forward, "packed_backward"_a = bytes.packed_backward,
                    "partial"_a = bytes.partial, "fuse_partial"_a = bytes.fuse_partial, "h"_a = bytes.h, "bits"_a = bytes.bits);
  }

  template <class Call>
  void launch(const char* name, Op op, const char* (*launcher)(const Problem&, const Call&, Stream), py::handle args,
              py::handle device, py::handle stream) const {
    Place places[kMostPlaces];
    const Call call = read_call<Call>(name, args, places);
    const int index = small_number_of(name, "device", device, 0);
    const Stream on = reinterpret_cast<Stream>(static_cast<uintptr_t>(number_of(name, "stream", stream)));
    const std::string& why = refusal_[static_cast<int>(op)];
    if (!why.empty()) throw std::runtime_error(std::string(name) + ": " + why);
    const char* error = nullptr;
    {
      py::gil_scoped_release unlocked;
      const DeviceGuard guard(index);
      error = guard.error;
      if (error == nullptr) {
        PlaceChecker check(name, places);
        check_call(check, problem_, call,
                   {scratch_.packed_forward, scratch_.packed_backward, scratch_.partial, scratch_.fuse_partial}, false);
        error = launcher(problem_, call, on);
      }
    }
    if (error != nullptr) {
      const std::string cause = driver_problem();
      throw std::runtime_error(std::string(name) + ": " + error + (cause.empty() ? "" : " (" + cause + ")"));
    }
  }

  py::object cpu_refusal() const {
    return cpu_refusal_.empty() ? py::none() : py::object(py::str(cpu_refusal_));
  }

  py::dict cpu_scratch() const {
    if (!cpu_refusal_.empty()) throw std::runtime_error("cpu_scratch: " + cpu_refusal_);
    return py::dict("packed_forward"_a = cpu_scratch_.packed_forward, "packed_backward"_a = cpu_scratch_.packed_backward);
  }

  template <class Call>
  void run_on_cpu(const char* name, void (*run)(const Problem&, const Call&, int), py::handle args, py::handle threads) const {
    Place places[kMostPlaces];
    const Call call = read_call<Call>(name, args, places);
    const int count = std::min(small_number_of(name, "threads", threads, 1), kMostThreads);
    if (!cpu_refusal_.empty()) throw std::runtime_error(std::string(name) + ": " + cpu_refusal_);
    py::gil_scoped_release unlocked;
    PlaceChecker check(name, places);
    check_call(check, problem_, call, {cpu_scratch_.packed_forward, cpu_scratch_.packed_backward, 0, 0}, true);
    run(problem_, call, count);
  }

 private:
  static constexpr int kMostThreads = 256;

  Problem problem_{};
  std::string refusal_[3], cpu_refusal_;  // empty: supported
  Scratch scratch_{};
  cpu::Scratch cpu_scratch_{};
};

std::vector<std::string> call_fields(const std::string& op) {
  if (op == "Plan") return names<Problem>();
  if (op == "tt_fuse_forward") return number_names<FuseCall>();
  if (op == "tt_fuse_backward") return number_names<FuseBackwardCall>();
  if (op == "dora_fuse_forward") return number_names<DoraCall>();
  if (op == "dora_fuse_backward") return number_names<DoraBackwardCall>();
  if (op == "tt_block_forward" || op == "cpu_block_forward") return number_names<ForwardCall>();
  if (op == "tt_block_backward" || op == "cpu_block_backward") return number_names<BackwardCall>();
  throw py::value_error("call_fields: there is no op " + op + "; it must be Plan or the name of a launch");
}

py::object version_or_none(int version) {
  if (version == 0) return py::none();
  return py::str(std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10));
}

py::dict build_info() {
#if defined(__clang__)
  const char* compiler = __VERSION__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
#if defined(LORA_EDGE_EMULATOR)
  const bool emulator = true;
#else
  const bool emulator = false;
#endif
  return py::dict("cpu"_a = cpu::instruction_set(), "cuda"_a = version_or_none(compiled_cuda_version()),
                  "architectures"_a = LORA_EDGE_ARCHITECTURES, "compiler"_a = compiler, "emulator"_a = emulator);
}

py::dict device_info_dict() {
  const DeviceInfo info = device_info();
  py::list devices;
  for (const Device& device : info.devices) {
    devices.append(py::dict("name"_a = device.name,
                            "capability"_a = std::to_string(device.major) + "." + std::to_string(device.minor),
                            "multiprocessors"_a = device.multiprocessors, "memory"_a = device.memory, "l2"_a = device.l2));
  }
  return py::dict("driver"_a = version_or_none(info.driver), "runtime"_a = version_or_none(info.runtime),
                  "count"_a = info.devices.size(), "devices"_a = devices,
                  "error"_a = info.error.empty() ? py::object(py::none()) : py::object(py::str(info.error)));
}

template <class Call>
void define_launch(py::class_<Plan>& plan, const char* name, Op op,
                   const char* (*launcher)(const Problem&, const Call&, Stream)) {
  plan.def(
      name,
      [name, op, launcher](const Plan& self, py::handle args, py::handle device, py::handle stream) {
        self.launch(name, op, launcher, args, device, stream);
      },
      "args"_a, "device"_a, "stream"_a,
      "Launch on a device's stream (a cudaStream_t as an int). args: a tuple of ints in the order of call_fields: addresses, "
      "each followed by the number of bytes there, 0 and 0 for None; strides in elements. TypeError: a wrong tuple. "
      "ValueError: a tensor does not have the plan's size. RuntimeError: the launch was refused or failed.");
}

template <class Call>
void define_run(py::class_<Plan>& plan, const char* name, void (*run)(const Problem&, const Call&, int)) {
  plan.def(
      name, [name, run](const Plan& self, py::handle args, py::handle threads) { self.run_on_cpu(name, run, args, threads); },
      "args"_a, "threads"_a,
      "Run on the CPU with up to `threads` threads. args as for a launch; channels are contiguous in every map, h is float32, "
      "the suffix is contracted. TypeError: a wrong tuple. ValueError: a tensor does not have the plan's size. "
      "RuntimeError: the CPU engine does not support this plan.");
}

}  // namespace
}  // namespace lora_edge

PYBIND11_MODULE(LORA_EDGE_MODULE, m) {
  using namespace lora_edge;
  m.doc() = "The kernels of lora_edge, called with plain numbers; use them through lora_edge.ops.";
  // module_local: the extension and a build for the emulator can be loaded into the same process.
  py::class_<Plan> plan(m, "Plan", py::module_local(),
                        "One adapted convolution on one input size: the fields of Problem in csrc/problem.h by name.");
  plan.def(py::init<const py::kwargs&>());
  plan.def("refusal", &Plan::refusal, "op"_a,
           "Why the kernels do not support this plan for tt_fuse, dora_fuse or tt_block, or None.");
  plan.def("scratch", &Plan::scratch, "Sizes in bytes of the buffers that a launch needs: scratch, h and bits.");
  define_launch(plan, "tt_fuse_forward", Op::tt_fuse, tt_fuse_forward);
  define_launch(plan, "tt_fuse_backward", Op::tt_fuse, tt_fuse_backward);
  define_launch(plan, "dora_fuse_forward", Op::dora_fuse, dora_fuse_forward);
  define_launch(plan, "dora_fuse_backward", Op::dora_fuse, dora_fuse_backward);
  define_launch(plan, "tt_block_forward", Op::tt_block, tt_block_forward);
  define_launch(plan, "tt_block_backward", Op::tt_block, tt_block_backward);
  plan.def("cpu_refusal", &Plan::cpu_refusal, "Why the CPU engine does not support this plan for tt_block, or None.");
  plan.def("cpu_scratch", &Plan::cpu_scratch,
           "Sizes in bytes of the scratch of a run on the CPU. RuntimeError: the CPU engine does not support this plan.");
  define_run(plan, "cpu_block_forward", cpu::block_forward);
  define_run(plan, "cpu_block_backward", cpu::block_backward);
  m.def("call_fields", &call_fields, "op"_a, "The names of a launch's args, or of Plan's keywords (\"Plan\"), in order.");
  m.def("build_info", &build_info,
        "The CPU engine's instruction set, CUDA version (None: built without), architectures, compiler, and whether this build "
        "is for the emulator.");
  m.def("device_info", &device_info_dict,
        "Driver, runtime and devices (memory and l2 in bytes); in `error` why there are no devices, or None.");
}
