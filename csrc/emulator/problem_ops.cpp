// The launchers of plan.h as ops of the runner.
#include "../fields.h"
#include "../plan.h"
#include "job.h"

namespace lora_edge::emulator {
namespace {

Problem problem_of(const Job& job, std::set<std::string>& known) {
  Problem problem{};
  visit(Fill{job, known}, problem);
  return problem;
}

Problem problem_of(const Job& job) {
  std::set<std::string> known;
  return problem_of(job, known);
}

template <class Call, const char* (*launcher)(const Problem&, const Call&, Stream)>
const char* run(const Job& job) {
  std::set<std::string> known;
  const Problem problem = problem_of(job, known);
  Call call{};
  visit(Fill{job, known}, call);
  for (const auto& [name, text] : job.fields) {
    if (known.count(name) == 0) throw std::runtime_error("no field is called `" + name + "`");
  }
  for (const auto& [name, pointer] : job.pointers) {
    if (known.count(name) == 0) throw std::runtime_error("no buffer is called `" + name + "`");
  }
  return launcher(problem, call, nullptr);
}

const char* refused_fuse(const Job& job) { return refusal(problem_of(job), "tt_fuse"); }
const char* refused_dora(const Job& job) { return refusal(problem_of(job), "dora_fuse"); }
const char* refused_block(const Job& job) { return refusal(problem_of(job), "tt_block"); }

int64_t scratch_bytes(const Job& job, const std::string& buffer) {
  const Scratch bytes = scratch(problem_of(job));
  if (buffer == "partial") return job.op == "tt_fuse_backward" ? bytes.fuse_partial : bytes.partial;
  if (buffer == "packed") return job.op == "tt_block_forward" ? bytes.packed_forward : bytes.packed_backward;
  if (buffer == "h") return bytes.h;
  if (buffer == "bits") return bytes.bits;
  throw std::runtime_error("the size of `" + buffer + "` is unknown");
}

std::string answer_scratch(const Job& job) {
  const Scratch s = scratch(problem_of(job));
  std::string text;
  for (const int64_t bytes : {s.packed_forward, s.packed_backward, s.partial, s.fuse_partial, s.h, s.bits}) {
    text += std::to_string(bytes) + " ";
  }
  return text;
}

std::string answer_nothing(const Job&) { return ""; }

const Register fuse_forward({"tt_fuse_forward", run<FuseCall, tt_fuse_forward>, refused_fuse, scratch_bytes});
const Register fuse_backward({"tt_fuse_backward", run<FuseBackwardCall, tt_fuse_backward>, refused_fuse, scratch_bytes});
const Register dora_forward({"dora_fuse_forward", run<DoraCall, dora_fuse_forward>, refused_dora});
const Register dora_backward({"dora_fuse_backward", run<DoraBackwardCall, dora_fuse_backward>, refused_dora});
const Register block_forward({"tt_block_forward", run<ForwardCall, tt_block_forward>, refused_block, scratch_bytes});
const Register block_backward({"tt_block_backward", run<BackwardCall, tt_block_backward>, refused_block, scratch_bytes});
const Register scratch_sizes({"scratch", nullptr, nullptr, nullptr, answer_scratch});
const Register fuse_refusal({"refusal of tt_fuse", nullptr, refused_fuse, nullptr, answer_nothing});
const Register dora_refusal({"refusal of dora_fuse", nullptr, refused_dora, nullptr, answer_nothing});
const Register block_refusal({"refusal of tt_block", nullptr, refused_block, nullptr, answer_nothing});

}  // namespace
}  // namespace lora_edge::emulator
