// A job of the runner: one op on buffers that hold exactly its tensors, under several schedules.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace lora_edge::emulator {

struct Job {
  std::string name, op;
  std::map<std::string, std::string> fields;  // numbers by field name
  std::map<std::string, void*> pointers;      // beginnings of the buffers' views, by buffer name
  uint64_t first_seed = 1;
  int seeds = 1;
  bool complete = true;  // every byte of the outputs must be written

  int64_t number(const std::string& field) const {
    const auto found = fields.find(field);
    return found == fields.end() ? 0 : std::strtoll(found->second.c_str(), nullptr, 10);
  }

  template <class T>
  T* pointer(const std::string& buffer) const {
    const auto found = pointers.find(buffer);
    return found == pointers.end() ? nullptr : static_cast<T*>(found->second);
  }
};

// A visitor for fields.h: fills a struct's fields from a job and records their names.
struct Fill {
  const Job& job;
  std::set<std::string>& known;

  template <class T>
  void operator()(const char* name, T& field) {
    known.insert(name);
    if constexpr (std::is_pointer_v<T>) {
      field = job.pointer<void>(name);
    } else if (const auto found = job.fields.find(name); found != job.fields.end()) {
      if constexpr (std::is_same_v<T, float>) {
        field = std::strtof(found->second.c_str(), nullptr);
      } else {
        field = static_cast<T>(std::strtoll(found->second.c_str(), nullptr, 10));
      }
    }
  }
};

struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// An op that jobs can name. `run` returns null or an error; the other functions are optional.
struct Op {
  const char* name;
  const char* (*run)(const Job&);
  const char* (*refusal)(const Job&) = nullptr;                              // called before the buffers are allocated
  int64_t (*scratch_bytes)(const Job&, const std::string& buffer) = nullptr;  // for a buffer whose size the job leaves open
  std::string (*answer)(const Job&) = nullptr;                               // returns a text; called instead of `run`
};

std::vector<Op>& ops();

struct Register {
  explicit Register(const Op& op) { ops().push_back(op); }
};

}  // namespace lora_edge::emulator
