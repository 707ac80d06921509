// Looks at the result of every op of the dispatcher for numbers that are not finite: finds where in
// a step things first go wrong. Slow (each result is read once more), so only for a replay.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/record_function.h>

#include "model/rwkv_model.h"

namespace rwkv {

class OpChecks {
 public:
  // Checks what this program's ops return, in all threads, until destroyed; one at a time. The
  // model's parameters serve to say where in it an op was called.
  explicit OpChecks(RwkvModel model);
  ~OpChecks();
  OpChecks(const OpChecks&) = delete;
  OpChecks& operator=(const OpChecks&) = delete;

  int64_t num_ops() const;
  // The first op whose result was not finite: its name, place, inputs and result; empty if none.
  std::string first_finding() const;

 private:
  struct Log;
  std::unique_ptr<Log> log_;
  at::CallbackHandle handle_;
};

// "[8, 256, 384] fp32, -3.1 to 2.9": a tensor in short, with the count of what is not finite.
std::string describe_values(const at::Tensor& tensor);

}  // namespace rwkv
