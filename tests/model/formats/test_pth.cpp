#include <cstring>
#include <functional>
#include <map>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/atomic_file.h"
#include "model/formats/pickle.h"
#include "model/formats/pth.h"
#include "model/formats/zip_archive.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::Each;
using testing::ElementsAre;
using testing::Field;
using testing::HasSubstr;
using std::string_literals::operator""s;

template <class T>
std::vector<T> values_of(const WeightFile& file, std::string_view name) {
  const StoredTensor* tensor = file.find(name);
  if (tensor == nullptr) {
    ADD_FAILURE() << "no tensor " << name;
    return {};
  }
  std::vector<std::byte> bytes;
  tensor->copy_to(bytes);
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!bytes.empty()) {
    std::memcpy(values.data(), bytes.data(), bytes.size());
  }
  return values;
}

std::vector<std::string> names_of(const WeightFile& file) {
  std::vector<std::string> names;
  for (const StoredTensor& tensor : file.tensors) {
    names.push_back(tensor.name);
  }
  return names;
}

size_t copy_all(const WeightFile& file) {
  std::vector<std::byte> bytes;
  for (const StoredTensor& tensor : file.tensors) {
    tensor.copy_to(bytes);
  }
  return bytes.size();
}

// ---- Files of others ----------------------------------------------------------------------------

class MixedFile : public testing::TestWithParam<const char*> {};

// Values: the data's README, section 5.
TEST_P(MixedFile, HasTheDocumentedTensors) {
  const std::string path = test::find_test_data("derived/pth_reader/" + std::string(GetParam()));
  SKIP_WITHOUT(path);
  const WeightFile file = read_pth(path);
  EXPECT_EQ(file.format, std::string(GetParam()) == "mixed_zip.pth" ? "pth" : "pth (legacy)");
  EXPECT_THAT(
      names_of(file),
      ElementsAre(
          "f32_2d", "f32_t", "f32_slice", "bf16", "f16", "i64_0d", "f32_111C", "empty", "param"));

  std::vector<float> eighths(24);
  std::vector<float> transposed(24);
  for (size_t i = 0; i < 24; ++i) {
    eighths[i] = static_cast<float>(i) / 8;
    transposed[i] = static_cast<float>(i % 4 * 6 + i / 4) / 8;
  }
  EXPECT_EQ(values_of<float>(file, "f32_2d"), eighths);
  EXPECT_EQ(values_of<float>(file, "f32_t"), transposed);
  EXPECT_THAT(file.find("f32_t")->shape, ElementsAre(6, 4));
  EXPECT_THAT(file.find("f32_t")->strides, ElementsAre(1, 6));
  EXPECT_THAT(values_of<float>(file, "f32_slice"),
              ElementsAre(1.0f, 1.125f, 1.25f, 1.75f, 1.875f, 2.0f));
  EXPECT_EQ(file.find("f32_slice")->storage.data(), file.find("f32_t")->storage.data());
  EXPECT_EQ(file.find("bf16")->dtype, WeightDtype::kBf16);
  EXPECT_THAT(values_of<uint16_t>(file, "bf16"),
              ElementsAre(0x3f80, 0xc020, 0x4049, 0x477f, 0x3a83));
  EXPECT_EQ(file.find("f16")->dtype, WeightDtype::kF16);
  EXPECT_THAT(values_of<uint16_t>(file, "f16"), ElementsAre(0x3c00, 0xc100, 0x3555, 0x7bff));
  EXPECT_THAT(values_of<int64_t>(file, "i64_0d"), ElementsAre(7));
  EXPECT_TRUE(file.find("i64_0d")->shape.empty());
  EXPECT_THAT(file.find("f32_111C")->shape, ElementsAre(1, 1, 5));
  EXPECT_THAT(values_of<float>(file, "f32_111C"), ElementsAre(0, 1, 2, 3, 4));
  EXPECT_THAT(file.find("empty")->shape, ElementsAre(0, 3));
  EXPECT_THAT(values_of<float>(file, "param"), ElementsAre(0.5f, 1.5f));
}

TEST_P(MixedFile, IsRefusedAtEveryTruncation) {
  const std::string path = test::find_test_data("derived/pth_reader/" + std::string(GetParam()));
  SKIP_WITHOUT(path);
  const std::string whole = test::read_file(path);
  const test::TempFolder folder;
  for (size_t length = 0; length < whole.size(); ++length) {
    // Removed first: some file systems wait for the disk when a file is overwritten.
    std::filesystem::remove(folder.path("cut.pth"));
    test::write_file(folder.path("cut.pth"), whole.substr(0, length));
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_pth(folder.path("cut.pth"))),
                HasSubstr("cut.pth: "))
        << length;
  }
}

TEST_P(MixedFile, IsReadOrRefusedWhateverIsFlipped) {
  const std::string path = test::find_test_data("derived/pth_reader/" + std::string(GetParam()));
  SKIP_WITHOUT(path);
  std::string whole = test::read_file(path);
  // Without the checksum of data.pkl, which would refuse each damage to it before it is read.
  if (const size_t directory = whole.find("PK\x01\x02"); directory != std::string::npos) {
    whole.replace(directory + 16, 4, 4, '\0');
  }
  const test::TempFolder folder;
  std::mt19937 random(7);
  int read = 0;
  int refused = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string damaged = whole;
    for (int flips = 0; flips < 1 + round % 4; ++flips) {
      damaged[random() % damaged.size()] = static_cast<char>(random());
    }
    std::filesystem::remove(folder.path("a.pth"));
    test::write_file(folder.path("a.pth"), damaged);
    try {
      EXPECT_LE(copy_all(read_pth(folder.path("a.pth"))), 256 * whole.size());
      ++read;
    } catch (const std::runtime_error& error) {
      EXPECT_THAT(error.what(), HasSubstr("a.pth: "));
      ++refused;
    }
  }
  // Damage to a tensor's numbers is nobody's to see; damage to what describes them mostly is.
  EXPECT_GT(read, 500);
  EXPECT_GT(refused, 500);
}

INSTANTIATE_TEST_SUITE_P(Pth,
                         MixedFile,
                         testing::Values("mixed_zip.pth", "mixed_legacy.pth"),
                         [](const auto& which) {
                           return std::string(which.param) == "mixed_zip.pth" ? "Zip" : "Legacy";
                         });

TEST(ReadPth, PassesOverTheMetadataOfAModule) {
  const std::string path = test::find_test_data("derived/pth_reader/linear_state_dict_zip.pth");
  SKIP_WITHOUT(path);
  const WeightFile file = read_pth(path);
  EXPECT_THAT(names_of(file), ElementsAre("weight", "bias"));
  EXPECT_THAT(file.find("weight")->shape, ElementsAre(2, 3));
  EXPECT_THAT(file.find("bias")->shape, ElementsAre(2));
}

TEST(ReadPth, ReadsTheCheckpointsOfRwkvLm) {
  for (const char* name : {"251105_reverse_L2.pth", "260123_reverse_L2_only_rwkv7.pth"}) {
    const std::string path = test::find_test_data("rwkv_lm_pth/" + std::string(name));
    SKIP_WITHOUT(path);
    const WeightFile file = read_pth(path);
    EXPECT_EQ(file.tensors.size(), 99u);
    EXPECT_THAT(file.tensors, Each(Field(&StoredTensor::dtype, WeightDtype::kF32)));
    EXPECT_THAT(file.find("e.weight")->shape, ElementsAre(12, 32));
  }
}

TEST(ReadPth, ReadsBf16WeightsOfARealModel) {
  const std::string path = test::find_test_data("derived/pth_reader/tiny-rwkv-7v0-834K.bf16.pth");
  SKIP_WITHOUT(path);
  const WeightFile file = read_pth(path);
  EXPECT_THAT(file.tensors, Each(Field(&StoredTensor::dtype, WeightDtype::kBf16)));
  EXPECT_THAT(file.find("emb.weight")->shape, ElementsAre(256, 64));
  EXPECT_THAT(file.find("blocks.0.att.r_k")->shape, ElementsAre(1, 64));
}

// ---- Files made here ----------------------------------------------------------------------------

// Writes a zip of these entries under "a/", as torch.save lays them out.
std::string write_zip(const test::TempFolder& folder,
                      const std::vector<std::pair<std::string, std::string>>& entries) {
  AtomicFile file(folder.path("x.pth"));
  ZipWriter zip(file);
  for (const auto& [name, content] : entries) {
    zip.add("a/" + name, content);
  }
  zip.finish();
  file.commit();
  return folder.path("x.pth");
}

// What the pickle of a hostile file may say of one tensor.
struct TensorSpec {
  std::string name = "w";
  std::string storage_class = "FloatStorage";
  std::string key = "0";
  int64_t numel = 6;
  int64_t offset = 0;
  std::vector<int64_t> sizes = {2, 3};
  std::vector<int64_t> strides = {3, 1};
};

void put_tensor(PickleWriter& writer, const TensorSpec& spec) {
  const auto put_sizes = [&](const std::vector<int64_t>& sizes) {
    writer.mark();
    for (const int64_t size : sizes) {
      writer.integer(size);
    }
    writer.tuple();
  };
  writer.global("torch._utils", "_rebuild_tensor_v2");
  writer.mark();
  writer.mark();
  writer.text("storage");
  writer.global("torch", spec.storage_class);
  writer.text(spec.key);
  writer.text("cuda:0");
  writer.integer(spec.numel);
  writer.tuple();
  writer.persistent();
  writer.integer(spec.offset);
  put_sizes(spec.sizes);
  put_sizes(spec.strides);
  writer.boolean(false);
  writer.empty_tuple();
  writer.tuple();
  writer.call();
}

void put_dict(PickleWriter& writer) {
  writer.global("collections", "OrderedDict");
  writer.empty_tuple();
  writer.call();
}

void put_tensors(PickleWriter& writer, const std::vector<TensorSpec>& specs) {
  put_dict(writer);
  for (const TensorSpec& spec : specs) {
    writer.text(spec.name);
    put_tensor(writer, spec);
    writer.set_item();
  }
}

const std::string kSixFloats =
    "\0\0\x80\x3f\0\0\0\x40\0\0\x40\x40\0\0\x80\x40\0\0\xa0\x40\0\0\xc0\x40"s;

// A file whose pickle `fill` writes and whose one storage "0" is the six floats 1 to 6.
std::string write_pickled(const test::TempFolder& folder,
                          const std::function<void(PickleWriter&)>& fill) {
  PickleWriter writer;
  fill(writer);
  return write_zip(folder,
                   {{"data.pkl", writer.finish()}, {"data/0", kSixFloats}, {"version", "3\n"}});
}

std::string pickled_refusal(const std::function<void(PickleWriter&)>& fill) {
  const test::TempFolder folder;
  const std::string path = write_pickled(folder, fill);
  const std::string text = THROWN_TEXT(std::runtime_error, read_pth(path));
  EXPECT_THAT(text, HasSubstr("x.pth: "));
  return text;
}

std::string tensor_refusal(const TensorSpec& spec) {
  return pickled_refusal([&](PickleWriter& writer) { put_tensors(writer, {spec}); });
}

TEST(ReadPth, ReadsAHandMadeFile) {
  const test::TempFolder folder;
  const WeightFile file = read_pth(
      write_pickled(folder, [](PickleWriter& writer) { put_tensors(writer, {TensorSpec{}}); }));
  EXPECT_THAT(values_of<float>(file, "w"), ElementsAre(1, 2, 3, 4, 5, 6));
}

TEST(ReadPth, RefusesTensorsThatReachOutsideTheirStorage) {
  const auto outside = HasSubstr("reaches outside its storage of 6 elements");
  EXPECT_THAT(tensor_refusal({.offset = 1}),
              AllOf(outside, HasSubstr("\"w\" of shape [2, 3], strides [3, 1], offset 1")));
  EXPECT_THAT(tensor_refusal({.sizes = {3, 3}}), outside);
  EXPECT_THAT(tensor_refusal({.strides = {4, 1}}), outside);
  EXPECT_THAT(tensor_refusal({.offset = INT64_MAX}), outside);
  EXPECT_THAT(tensor_refusal({.strides = {INT64_MAX, INT64_MAX}}), outside);
  EXPECT_THAT(tensor_refusal({.sizes = {int64_t{1} << 40, 1}, .strides = {int64_t{1} << 40, 1}}),
              outside);
}

TEST(ReadPth, RefusesNegativeAndOverflowingNumbers) {
  const auto negative = HasSubstr(", expected a whole number of at least 0; the file is damaged");
  EXPECT_THAT(tensor_refusal({.offset = -1}),
              AllOf(HasSubstr("the tensor \"w\" has the offset -1"), negative));
  EXPECT_THAT(tensor_refusal({.sizes = {-2, -3}}), AllOf(HasSubstr("has the size -2"), negative));
  EXPECT_THAT(tensor_refusal({.strides = {-3, 1}}), AllOf(HasSubstr("the stride -3"), negative));
  EXPECT_THAT(tensor_refusal({.numel = -6}), AllOf(HasSubstr("has the numel -6"), negative));
  EXPECT_THAT(tensor_refusal({.sizes = {int64_t{1} << 31, int64_t{1} << 31}, .strides = {0, 0}}),
              HasSubstr("too large"));
  EXPECT_THAT(tensor_refusal({.strides = {3}}), HasSubstr("as many strides as sizes"));
  EXPECT_THAT(tensor_refusal({.sizes = std::vector<int64_t>(9, 1)}),
              HasSubstr("the tensor \"w\" has 9 dimensions"));
}

TEST(ReadPth, RefusesASmallFileThatClaimsGigabytes) {
  EXPECT_THAT(tensor_refusal({.sizes = {1 << 20, 3}, .strides = {0, 1}}),
              HasSubstr("its tensors up to \"w\" have 12,582,912 bytes, expected at most"));
  // A modest repetition is what PyTorch saves of tensor.expand().
  const test::TempFolder folder;
  const WeightFile file = read_pth(write_pickled(folder, [](PickleWriter& writer) {
    put_tensors(writer, {{.sizes = {2, 3}, .strides = {0, 1}}});
  }));
  EXPECT_THAT(values_of<float>(file, "w"), ElementsAre(1, 2, 3, 1, 2, 3));
}

TEST(ReadPth, LetsTensorsBeFourTimesALargeFileAnd128MiBOfASmallOne) {
  const test::TempFolder folder;
  // A storage of so many floats, and a tensor that repeats it so often.
  const auto read = [&](int64_t numel, int64_t times) {
    PickleWriter writer;
    put_tensors(writer, {{.numel = numel, .sizes = {times, numel}, .strides = {0, 1}}});
    std::filesystem::remove(folder.path("x.pth"));
    return read_pth(write_zip(folder,
                              {{"data.pkl", writer.finish()},
                               {"data/0", std::string(4 * static_cast<size_t>(numel), 1)}}));
  };
  constexpr int64_t kMiB = int64_t{1} << 18;  // of floats
  EXPECT_EQ(read(kMiB, 128).tensors[0].num_elements(), 128 * kMiB);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read(kMiB, 129)),
              HasSubstr("have 135,266,304 bytes, expected at most 134,217,728 in a file of 1,04"));
  EXPECT_EQ(read(40 * kMiB, 4).tensors[0].num_elements(), 160 * kMiB);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read(40 * kMiB, 5)), HasSubstr("have 209,715,200"));
}

TEST(ReadPth, RefusesMoreTensorsThanAModelHas) {
  // One tensor under many names: a dict, then the tensor from the memo under each.
  const auto with_names = [](int count) {
    PickleWriter writer;
    put_tensor(writer, {});
    std::string pickle = writer.finish();
    pickle.back() = 'q';
    pickle += std::string(1, 0) + "0}(";
    for (int i = 0; i < count; ++i) {
      const std::string name = std::to_string(i);
      pickle +=
          "\x8c" + std::string(1, static_cast<char>(name.size())) + name + "h" + std::string(1, 0);
    }
    return pickle + "u.";
  };
  const test::TempFolder folder;
  const auto read = [&](int count) {
    std::filesystem::remove(folder.path("x.pth"));
    return read_pth(write_zip(folder, {{"data.pkl", with_names(count)}, {"data/0", kSixFloats}}));
  };
  EXPECT_EQ(read(1000).tensors.size(), 1000u);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read((1 << 16) + 1)),
              HasSubstr("more than 65536 tensors"));
}

TEST(ReadPth, RefusesStoragesThatDoNotFit) {
  EXPECT_THAT(tensor_refusal({.numel = 7}),
              HasSubstr("\"a/data/0\" has 24 bytes, but data.pkl lists 7 f32 elements"));
  EXPECT_THAT(tensor_refusal({.numel = INT64_MAX}), HasSubstr("24 bytes, but"));
  EXPECT_THAT(tensor_refusal({.key = "1"}), HasSubstr("lacks the storage \"data/1\""));
  EXPECT_THAT(tensor_refusal({.storage_class = "QInt8Storage"}),
              HasSubstr("x.pth: data.pkl wants torch.QInt8Storage"));
  EXPECT_THAT(tensor_refusal({.storage_class = "float32"}),
              HasSubstr("the storage of the tensor \"w\" is of class \"torch.float32\""));
  EXPECT_THAT(
      tensor_refusal({.key = std::string(65, '0')}),
      HasSubstr("the storage of the tensor \"w\" is a tuple of 5, expected (\"storage\", "));
}

TEST(ReadPth, RefusesNamesThatOccurTwiceOrAreNoText) {
  EXPECT_THAT(pickled_refusal([](PickleWriter& writer) {
                put_tensors(writer, {TensorSpec{}, TensorSpec{}});
              }),
              HasSubstr("two tensors are named \"w\""));
  EXPECT_THAT(tensor_refusal({.name = "w\xff"}), HasSubstr("\"w\\xff\" is not UTF-8"));
  EXPECT_THAT(tensor_refusal({.name = std::string(2000, 'w')}), HasSubstr("has 2000 bytes"));
  EXPECT_THAT(pickled_refusal([](PickleWriter& writer) {
                put_dict(writer);
                writer.integer(3);
                put_tensor(writer, {});
                writer.set_item();
              }),
              HasSubstr("a tensor is filed under 3, expected its name"));
}

TEST(ReadPth, TakesOffPrefixesCommonToAllNames) {
  const auto names = [](std::vector<std::string> given) {
    const test::TempFolder folder;
    return names_of(read_pth(write_pickled(folder, [&](PickleWriter& writer) {
      std::vector<TensorSpec> specs;
      for (const std::string& name : given) {
        specs.push_back({.name = name});
      }
      put_tensors(writer, specs);
    })));
  };
  EXPECT_THAT(names({"module.a", "module.b"}), ElementsAre("a", "b"));
  EXPECT_THAT(names({"_forward_module.model.a", "_forward_module.model.b"}), ElementsAre("a", "b"));
  EXPECT_THAT(names({"model.a", "head"}), ElementsAre("model.a", "head"));
  EXPECT_THAT(names({"model."}), ElementsAre("model."));
}

// A dict with one entry for each name, whose values `fill` writes.
void put_wrapped(PickleWriter& writer,
                 const std::vector<std::pair<std::string, std::function<void()>>>& entries) {
  put_dict(writer);
  for (const auto& [name, fill] : entries) {
    writer.text(name);
    fill();
    writer.set_item();
  }
}

TEST(ReadPth, FindsTheOneDictThatHoldsTensors) {
  const auto names = [](std::vector<std::string> keys) {
    const test::TempFolder folder;
    return names_of(read_pth(write_pickled(folder, [&](PickleWriter& writer) {
      std::vector<std::pair<std::string, std::function<void()>>> entries = {
          {"step", [&] { writer.integer(3); }}, {"none", [&] { put_dict(writer); }}};
      for (const std::string& key : keys) {
        entries.emplace_back(key, [&] { put_tensors(writer, {{.name = "in " + key}}); });
      }
      put_wrapped(writer, entries);
    })));
  };
  EXPECT_THAT(names({"state_dict"}), ElementsAre("in state_dict"));
  EXPECT_THAT(names({"anything"}), ElementsAre("in anything"));
  EXPECT_THAT(names({"ema", "module", "optimizer"}), ElementsAre("in module"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, names({"ema", "net"})),
              HasSubstr("dicts of tensors under \"ema\" and \"net\""));
}

TEST(ReadPth, RefusesFilesWithoutAStateDict) {
  const auto none = HasSubstr("holds no dict of tensors");
  EXPECT_THAT(pickled_refusal(put_dict), none);
  EXPECT_THAT(pickled_refusal([](PickleWriter& writer) { put_tensor(writer, {}); }), none);
  // A dict that holds itself, twice at each level.
  const test::TempFolder folder;
  const std::string cyclic = "\x80\x02}q\x00(K\x01h\x00K\x02h\x00u."s;
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_pth(write_zip(folder, {{"data.pkl", cyclic}}))),
              none);
}

TEST(ReadPth, LooksAtASharedDictOnce) {
  // Four levels of 1000 references to the level below: 10^12 ways down, four dicts.
  std::string pickle = "\x80\x04}\x94";
  for (int level = 0; level < 4; ++level) {
    pickle += "}\x94(";
    for (int i = 0; i < 1000; ++i) {
      pickle += "Nh" + std::string(1, static_cast<char>(level));
    }
    pickle += 'u';
  }
  // The levels lie under each other on the stack; only the last is the root.
  pickle +=
      "\x94"
      "0000" +
      "0h\x04."s;
  const test::TempFolder folder;
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_pth(write_zip(folder, {{"data.pkl", pickle}}))),
              HasSubstr("holds no dict of tensors"));
}

TEST(ReadPth, RefusesFilesThatChatRwkvConverted) {
  for (const char* mark : {"_strategy", "_version"}) {
    EXPECT_THAT(pickled_refusal([&](PickleWriter& writer) {
                  put_tensors(writer, {TensorSpec{}});
                  writer.text(mark);
                  writer.text("cuda fp16i8");
                  writer.set_item();
                }),
                AllOf(HasSubstr("converted by ChatRWKV"), HasSubstr(mark)));
  }
}

TEST(ReadPth, RefusesTensorsMarkedAsNegatedOrConjugated) {
  // (storage, 0, (6,), (1,), False, OrderedDict(), {"neg": True})
  const std::string pickle =
      "\x80\x02}X\x01\x00\x00\x00w"
      "ctorch._utils\n_rebuild_tensor_v2\n("
      "(X\x07\x00\x00\x00storage"
      "ctorch\nFloatStorage\nX\x01\x00\x00\x00"
      "0X\x03\x00\x00\x00"
      "cpuK\x06tQK\x00K\x06\x85K\x01\x85\x89)}X\x03\x00\x00\x00neg\x88stRs."s;
  const test::TempFolder folder;
  const std::string path = write_zip(folder, {{"data.pkl", pickle}, {"data/0", kSixFloats}});
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_pth(path)), HasSubstr("\"neg\""));
}

TEST(ReadPth, RefusesCodeByName) {
  const test::TempFolder folder;
  const std::string path = write_zip(folder,
                                     {{"data.pkl",
                                       "\x80\x02"
                                       "cos\nsystem\nX\x02\x00\x00\x00ls\x85R."s}});
  EXPECT_THAT(
      THROWN_TEXT(std::runtime_error, read_pth(path)),
      HasSubstr("x.pth: data.pkl wants os.system, which a state dict does not need; refused"));
}

TEST(ReadPth, RefusesBigEndianFiles) {
  PickleWriter writer;
  put_tensors(writer, {TensorSpec{}});
  const std::string pickle = writer.finish();
  const auto with_order = [&](const std::string& order) {
    const test::TempFolder folder;
    return read_pth(
        write_zip(folder, {{"data.pkl", pickle}, {"byteorder", order}, {"data/0", kSixFloats}}));
  };
  EXPECT_EQ(with_order("little").tensors.size(), 1u);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, with_order("big")),
              HasSubstr("byte order is \"big\", expected \"little\""));
}

TEST(ReadPth, RefusesDamageThatTheChecksumOfThePickleShows) {
  const test::TempFolder folder;
  const std::string path =
      write_pickled(folder, [](PickleWriter& writer) { put_tensors(writer, {TensorSpec{}}); });
  std::string content = test::read_file(path);
  content[content.find("cuda:0")] = 'x';
  test::write_file(path, content);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_pth(path)), HasSubstr("checksum"));
}

TEST(ReadPth, RefusesOtherZipFiles) {
  const test::TempFolder folder;
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_pth(write_zip(folder, {{"model.pth", "x"}}))),
              HasSubstr("without a data.pkl"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error,
                          read_pth(write_zip(folder, {{"data.pkl", "x"}, {"constants.pkl", "x"}}))),
              HasSubstr("TorchScript"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error,
                          read_pth(test::find_test_data("corpora/nltk/state_union.zip").empty()
                                       ? write_zip(folder, {{"b", ""}})
                                       : test::find_test_data("corpora/nltk/state_union.zip"))),
              HasSubstr("without a data.pkl"));
}

// A legacy file of one tensor whose storage is the six floats; `view` is its pickled view.
std::string legacy_file(const std::string& view, const std::string& sizes_and_strides) {
  return "\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03."
         "\x80\x02}X\x0d\x00\x00\x00little_endian\x88s."
         "\x80\x02}X\x01\x00\x00\x00w"
         "ctorch._utils\n_rebuild_tensor_v2\n("
         "(X\x07\x00\x00\x00storage"
         "ctorch\nFloatStorage\nX\x01\x00\x00\x00"
         "9X\x03\x00\x00\x00"
         "cpuK\x06"s +
         view + "tQK\x00"s + sizes_and_strides +
         "\x89)tRs.\x80\x02]X\x01\x00\x00\x00"
         "9a.\x06\x00\x00\x00\x00\x00\x00\x00"s +
         kSixFloats;
}

TEST(ReadPth, ReadsViewsOfLegacyStorages) {
  const test::TempFolder folder;
  const auto read = [&](const std::string& content) {
    test::write_file(folder.path("x.pth"), content);
    return read_pth(folder.path("x.pth"));
  };
  // The view (key, offset 2, numel 3); the tensor is all of it.
  EXPECT_THAT(
      values_of<float>(read(legacy_file("X\x01\x00\x00\x00vK\x02K\x03\x87"s, "K\x03\x85K\x01\x85")),
                       "w"),
      ElementsAre(3, 4, 5));
  EXPECT_THAT(values_of<float>(read(legacy_file("N", "K\x06\x85K\x01\x85")), "w"),
              ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_THAT(
      THROWN_TEXT(std::runtime_error,
                  read(legacy_file("X\x01\x00\x00\x00vK\x04K\x03\x87"s, "K\x03\x85K\x01\x85"))),
      HasSubstr("a view of the storage \"9\" reaches outside it"));
  EXPECT_THAT(
      THROWN_TEXT(std::runtime_error,
                  read(legacy_file("X\x01\x00\x00\x00vK\x02K\x03\x87"s, "K\x04\x85K\x01\x85"))),
      HasSubstr("reaches outside its storage of 3 elements"));
}

TEST(ReadPth, VerifiesTheChecksumsOfTensorsWhenAsked) {
  const test::TempFolder folder;
  const std::string path =
      write_pickled(folder, [](PickleWriter& writer) { put_tensors(writer, {TensorSpec{}}); });
  verify_checksums(read_pth(path));
  std::string content = test::read_file(path);
  content[content.find(kSixFloats) + 3] = 'x';
  std::filesystem::remove(path);
  test::write_file(path, content);
  const WeightFile file = read_pth(path);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, verify_checksums(file)),
              HasSubstr("x.pth: \"a/data/0\" has the checksum"));
  // The legacy container has none.
  std::filesystem::remove(path);
  test::write_file(path, legacy_file("N", "K\x06\x85K\x01\x85"));
  verify_checksums(read_pth(path));
}

TEST(ReadPth, RefusesLegacyFilesOfAnotherKind) {
  const test::TempFolder folder;
  const std::string good = legacy_file("N", "K\x06\x85K\x01\x85");
  const auto refusal = [&](std::string content, const std::string& from, const std::string& to) {
    const size_t at = content.find(from);
    EXPECT_NE(at, std::string::npos);
    content.replace(at, from.size(), to);
    test::write_file(folder.path("x.pth"), content);
    return THROWN_TEXT(std::runtime_error, read_pth(folder.path("x.pth")));
  };
  EXPECT_THAT(refusal(good, "little_endian\x88", "little_endian\x89"), HasSubstr("big-endian"));
  EXPECT_THAT(refusal(good, "M\xe9\x03", "M\xea\x03"), HasSubstr("expected 1001"));
  EXPECT_THAT(refusal(good, "9a.", "8a."), HasSubstr("\"8\" is listed that no tensor uses"));
  EXPECT_THAT(refusal(good, "9a.\x06", "9a.\x05"), HasSubstr("but 5 in its own header"));
  EXPECT_THAT(refusal(good,
                      "]X\x01\x00\x00\x00"
                      "9a."s,
                      "]."),
              HasSubstr("\"9\" of a tensor is missing"));
  EXPECT_THAT(refusal(good, "tRs.", "tRN."), HasSubstr("4 values on the stack"));
}

// ---- Writing ------------------------------------------------------------------------------------

TEST(WritePth, ReturnsWhatItWroteByteForByte) {
  const test::TempFolder folder;
  std::vector<std::byte> data(48);
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<std::byte>(i * 5);
  }
  const std::span<const std::byte> all(data);
  std::vector<TensorToWrite> tensors;
  for (const WeightDtype dtype : {WeightDtype::kF64,
                                  WeightDtype::kF32,
                                  WeightDtype::kF16,
                                  WeightDtype::kBf16,
                                  WeightDtype::kI64,
                                  WeightDtype::kI32,
                                  WeightDtype::kI16,
                                  WeightDtype::kI8,
                                  WeightDtype::kU8,
                                  WeightDtype::kBool}) {
    tensors.push_back({.name = "z." + std::string(name_of(dtype)),
                       .dtype = dtype,
                       .shape = {1, 2, 3},
                       .data = all.first(static_cast<size_t>(6 * size_of(dtype)))});
  }
  tensors.push_back({.name = "scalar", .shape = {}, .data = all.first(4)});
  tensors.push_back({.name = "empty", .shape = {0, 3}, .data = {}});
  write_pth(folder.path("a.pth"), tensors);
  write_pth(folder.path("b.pth"), tensors);
  EXPECT_EQ(test::read_file(folder.path("a.pth")), test::read_file(folder.path("b.pth")));

  const WeightFile file = read_pth(folder.path("a.pth"));
  EXPECT_TRUE(file.metadata.empty());
  ASSERT_EQ(file.tensors.size(), tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(file.tensors[i].name, tensors[i].name);
    EXPECT_EQ(file.tensors[i].dtype, tensors[i].dtype);
    EXPECT_EQ(file.tensors[i].shape, tensors[i].shape);
    std::vector<std::byte> bytes;
    file.tensors[i].copy_to(bytes);
    EXPECT_TRUE(
        std::equal(bytes.begin(), bytes.end(), tensors[i].data.begin(), tensors[i].data.end()));
    const auto offset = file.tensors[i].storage.data() - file.mapping->bytes().data();
    EXPECT_EQ(offset % 64, 0) << tensors[i].name;
  }
}

TEST(WritePth, RefusesWhatItCouldNotReadAndLeavesNothing) {
  const test::TempFolder folder;
  const std::vector<std::byte> data(8);
  const TensorToWrite good{.name = "a", .shape = {2}, .data = data};
  const auto text = [&](std::vector<TensorToWrite> tensors) {
    return THROWN_TEXT(std::invalid_argument, write_pth(folder.path("a.pth"), tensors));
  };
  EXPECT_THAT(text({good, good}), HasSubstr("a.pth: two tensors are named \"a\""));
  EXPECT_THAT(text({{.name = "a", .shape = {2, 2}, .data = data}}), HasSubstr("expected 16"));
  EXPECT_THAT(text({{.name = "a", .shape = {INT64_MAX, 4}, .data = data}}), HasSubstr("8 bytes"));
  EXPECT_THAT(text({{.name = "\xff", .shape = {2}, .data = data}}), HasSubstr("not UTF-8"));
  EXPECT_TRUE(folder.files().empty());
  EXPECT_THROW(write_pth(folder.path("missing/a.pth"), std::span(&good, 1)), std::runtime_error);
}

}  // namespace
}  // namespace rwkv
