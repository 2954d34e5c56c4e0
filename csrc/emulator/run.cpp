// Runs jobs: `run JOBS OUTPUTS [FIRST [TRACE]]`. JOBS is a sequence of
//
//   job NAME
//   op OP
//   set FIELD NUMBER                  may be repeated
//   seeds FIRST COUNT                 the schedules; outputs must not depend on them
//   buffer NAME ROLE BYTES OFFSET     ROLE in, out, scratch; BYTES of the view, -1: the op knows; OFFSET from alignment
//   partly                            outputs may have unwritten bytes
//   trace LAUNCH BLOCK...             record these blocks of that launch, and run no others
//   data                              followed by the bytes of the inputs' views, in the order of the buffers
//
// Jobs before number FIRST are skipped. Every job prints a line `begin I` and one of `ok I OFFSET` (where in OUTPUTS its
// outputs begin, one after the other), `answer I TEXT`, `refused I TEXT`, `error I TEXT`. trace.h describes TRACE.*.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

#include "global_memory.h"
#include "job.h"
#include "scheduler.h"
#include "trace.h"

namespace lora_edge::emulator {

std::vector<Op>& ops() {
  static std::vector<Op> all;
  return all;
}

namespace {

struct BufferText {
  std::string name;
  Role role;
  int64_t bytes, offset;
  std::string data;
};

struct JobText {
  Job job;
  std::vector<BufferText> buffers;
  std::map<int64_t, std::vector<int64_t>> trace;
};

bool read_job(std::istream& file, JobText& text) {
  text = JobText{};
  std::string line;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    std::string word;
    words >> word;
    if (word == "job") {
      text.job.name = line.substr(4);
    } else if (word == "op") {
      text.job.op = line.substr(3);
    } else if (word == "set") {
      std::string field;
      words >> field >> text.job.fields[field];
    } else if (word == "seeds") {
      words >> text.job.first_seed >> text.job.seeds;
    } else if (word == "buffer") {
      BufferText buffer;
      std::string role;
      words >> buffer.name >> role >> buffer.bytes >> buffer.offset;
      buffer.role = role == "in" ? Role::in : role == "out" ? Role::out : Role::scratch;
      text.buffers.push_back(buffer);
    } else if (word == "partly") {
      text.job.complete = false;
    } else if (word == "trace") {
      int64_t launch, block;
      words >> launch;
      std::vector<int64_t>& blocks = text.trace[launch];
      while (words >> block) blocks.push_back(block);
    } else if (word == "data") {
      for (BufferText& buffer : text.buffers) {
        if (buffer.role != Role::in) continue;
        buffer.data.resize(static_cast<size_t>(buffer.bytes));
        file.read(buffer.data.data(), buffer.bytes);
      }
      return true;
    } else {
      std::cerr << "not a job: " << line << "\n";
      std::exit(2);
    }
  }
  return false;
}

const Op& op_of(const Job& job) {
  for (const Op& op : ops()) {
    if (job.op == op.name) return op;
  }
  throw std::runtime_error("no op is called `" + job.op + "`");
}

// The registered buffers of a job, each in a separate allocation that ends where the view ends.
struct Allocations {
  std::vector<std::unique_ptr<char, decltype(&std::free)>> memory;

  Allocations(JobText& text, const Op& op) {
    buffers.clear();
    for (BufferText& wanted : text.buffers) {
      if (wanted.bytes < 0 && op.scratch_bytes != nullptr) wanted.bytes = op.scratch_bytes(text.job, wanted.name);
      if (wanted.bytes < 0) throw std::runtime_error("the size of `" + wanted.name + "` is unknown");
      const int64_t end = wanted.offset + wanted.bytes;
      void* data = nullptr;
      if (posix_memalign(&data, 256, static_cast<size_t>(end)) != 0) throw std::bad_alloc();
      memory.emplace_back(static_cast<char*>(data), &std::free);
      buffers.push_back({wanted.name, wanted.role, static_cast<char*>(data), wanted.offset, end, {}});
      text.job.pointers[wanted.name] = static_cast<char*>(data) + wanted.offset;
      if (wanted.role == Role::in && wanted.bytes > 0) {
        std::memcpy(static_cast<char*>(data) + wanted.offset, wanted.data.data(), wanted.data.size());
      }
    }
  }
  ~Allocations() { buffers.clear(); }
};

std::string outputs() {
  std::string bytes;
  for (const Buffer& buffer : buffers) {
    if (buffer.role == Role::out) bytes.append(buffer.data + buffer.begin, buffer.data + buffer.end);
  }
  return bytes;
}

std::string place_in_outputs(int64_t at) {
  for (const Buffer& buffer : buffers) {
    if (buffer.role != Role::out) continue;
    if (at < buffer.end - buffer.begin) return "byte " + std::to_string(at) + " of `" + buffer.name + "`";
    at -= buffer.end - buffer.begin;
  }
  return "?";
}

void run_once(const Job& job, const Op& op, uint64_t seed) {
  options.seed = seed;
  for (const Buffer& buffer : buffers) {
    if (buffer.role != Role::in && buffer.end > 0) std::memset(buffer.data, 0xff, static_cast<size_t>(buffer.end));
  }
  global_begin_run();
  trace_begin_run();
  const char* error = op.run(job);
  if (error != nullptr) throw std::runtime_error("seed " + std::to_string(seed) + ": " + error);
  if (trace_plan.on || !job.complete) return;
  for (const Buffer& buffer : buffers) {
    if (buffer.role != Role::out) continue;
    const int64_t byte = global_unwritten(buffer);
    if (byte >= 0) throw std::runtime_error("byte " + std::to_string(byte) + " of `" + buffer.name + "` is never written");
  }
}

std::string run_job(JobText& text) {
  const Op& op = op_of(text.job);
  if (op.refusal != nullptr) {
    if (const char* why = op.refusal(text.job)) throw Refused(why);
  }
  const Allocations allocations(text, op);
  trace_plan.on = !text.trace.empty();
  trace_plan.blocks = text.trace;
  const Job& job = text.job;
  run_once(job, op, job.first_seed);
  const std::string first = outputs();
  if (trace_plan.on) return first;
  for (uint64_t seed = job.first_seed + 1; seed < job.first_seed + static_cast<uint64_t>(job.seeds); ++seed) {
    run_once(job, op, seed);
    const std::string bytes = outputs();
    if (bytes == first) continue;
    int64_t at = 0;
    while (bytes[static_cast<size_t>(at)] == first[static_cast<size_t>(at)]) ++at;
    throw std::runtime_error("seed " + std::to_string(seed) + " gives another result than seed " +
                             std::to_string(job.first_seed) + " at " + place_in_outputs(at));
  }
  return first;
}

void answer(JobText& text, int64_t index, std::ofstream& results) {
  try {
    const Op& op = op_of(text.job);
    if (op.answer != nullptr) {
      const char* why = op.refusal != nullptr ? op.refusal(text.job) : nullptr;
      if (why != nullptr) throw Refused(why);
      std::cout << "answer " << index << " " << op.answer(text.job) << std::endl;
      return;
    }
    const std::string bytes = run_job(text);
    const int64_t offset = results.tellp();
    results.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush();
    std::cout << "ok " << index << " " << offset << std::endl;
  } catch (const Refused& refused) {
    std::cout << "refused " << index << " " << refused.what() << std::endl;
  } catch (const std::exception& error) {
    std::cout << "error " << index << " " << error.what() << std::endl;
  }
}

}  // namespace
}  // namespace lora_edge::emulator

int main(int count, char** arguments) {
  using namespace lora_edge::emulator;
  if (count < 3) {
    std::cerr << "run JOBS OUTPUTS [FIRST [TRACE]]\n";
    return 2;
  }
  std::ifstream jobs(arguments[1], std::ios::binary);
  std::ofstream results(arguments[2], std::ios::binary);
  const int64_t first = count > 3 ? std::atoll(arguments[3]) : 0;
  if (count > 4) {
    const std::string trace = arguments[4];
    trace_plan.lines = std::fopen((trace + ".jsonl").c_str(), "w");
    trace_plan.sectors = std::fopen((trace + ".sectors").c_str(), "wb");
  }
  JobText text;
  for (int64_t index = 0; read_job(jobs, text); ++index) {
    if (index < first) continue;
    std::cout << "begin " << index << std::endl;
    if (!text.trace.empty() && trace_plan.lines == nullptr) {
      std::cout << "error " << index << " a trace needs a file name: run JOBS OUTPUTS FIRST TRACE" << std::endl;
      continue;
    }
    answer(text, index, results);
  }
  for (std::FILE* file : {trace_plan.lines, trace_plan.sectors}) {
    if (file != nullptr) std::fclose(file);
  }
}
