// Weight files that are right but for what a test changes in them.
#pragma once

#include <map>
#include <string>

#include <ATen/core/Tensor.h>

#include <gtest/gtest.h>

#include "model/formats/format_registry.h"
#include "model/weights.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"

namespace rwkv::test {

class ChangedFile : public testing::Test {
 protected:
  // `name` as find_test_data() takes it.
  explicit ChangedFile(const std::string& name) : name_(name) {}
  void SetUp() override {
    const std::string path = find_test_data(name_);
    SKIP_WITHOUT(path);
    tensors_ = load_tensors(path);
  }
  std::string path() const { return folder_.path("changed.safetensors"); }
  // What opening the file says, which is written with the tensors as they are now.
  std::string error() const {
    write_weights(path(), to_write(NamedTensors(tensors_.begin(), tensors_.end())), {});
    return THROWN_TEXT(std::runtime_error, open_model(path(), at::kFloat));
  }

  std::map<std::string, at::Tensor> tensors_;

 private:
  std::string name_;
  TempFolder folder_;
};

}  // namespace rwkv::test
