// What a checkpoint consists of: manifest.json, the last file to be written into its folder.
//
//   {"step": 200, "processes": 1, "rookery": "0.1.0",
//    "files": [{"name": "model.safetensors", "bytes": 4096, "xxh3_128": "<32 hex digits>"}, ...]}
//
// "processes" is how many wrote the checkpoint, "rookery" the version of the program, "files" lists
// every other file of the folder. A checkpoint from before there were manifests has none, and its
// trainer.json has no "processes" either; it is whole if its four files are there.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rwkv {

inline constexpr const char* kManifestName = "manifest.json";

struct ManifestFile {
  std::string name;
  uint64_t bytes = 0;
  std::string checksum;  // content_hash()
};

struct Manifest {
  int64_t step = 0;
  int64_t processes = 1;
  std::string version;
  std::vector<ManifestFile> files;
};

std::string to_json(const Manifest& manifest);
// Throws std::runtime_error naming the file if it cannot be read or is not a manifest.
Manifest read_manifest(const std::string& checkpoint);

// How closely a checkpoint is looked at: sizes, and the contents of small files; those of the
// weights, too; or all contents, which takes as long as reading it from the disk.
enum class Scrutiny { kSizes, kWeights, kContents };
// What keeps a checkpoint from being whole: the file, what was found, what was expected. Empty if
// nothing does.
std::string find_damage(const std::string& checkpoint, Scrutiny scrutiny);
// The same of what is given as a model, for those who read all of its weights: a file, and a folder
// with weights alone, are no checkpoints, and nothing is to be found.
std::string find_damage_of_model(const std::string& path);

}  // namespace rwkv
