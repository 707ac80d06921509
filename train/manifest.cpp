#include "train/manifest.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>
#include <system_error>

#include <nlohmann/json.hpp>

#include "data/atomic_file.h"
#include "data/content_hash.h"
#include "data/json_text.h"
#include "data/mapped_file.h"
#include "data/number_text.h"

namespace rwkv {
namespace {

namespace fs = std::filesystem;

// A line for each file; of thousands of processes, megabytes.
constexpr uint64_t kMaxManifestBytes = uint64_t{1} << 26;
// Of this size and less a file's contents are always looked at: configurations and records.
constexpr uint64_t kSmallBytes = uint64_t{1} << 20;

// What a checkpoint without a manifest must hold.
constexpr const char* kOldFiles[] = {
    "config.toml", "trainer.json", "model.safetensors", "optimizer.safetensors"};

// Whether the checkpoint was written by a program that writes manifests.
bool had_manifest(const fs::path& checkpoint) {
  try {
    const std::string path = (checkpoint / "trainer.json").string();
    return parse_json(read_text_file(path, kSmallBytes), path, "").contains("processes");
  } catch (const std::runtime_error&) {
    return false;  // and whoever reads it will say what is wrong with it
  }
}

std::string find_damage_of_old(const fs::path& checkpoint) {
  for (const char* name : kOldFiles) {
    if (!fs::is_regular_file(checkpoint / name)) {
      return (checkpoint / name).string() + ": is missing";
    }
  }
  return had_manifest(checkpoint) ? (checkpoint / kManifestName).string() + ": is missing" : "";
}

std::string find_damage(const fs::path& checkpoint, const ManifestFile& file, Scrutiny scrutiny) {
  const std::string path = (checkpoint / file.name).string();
  std::error_code error;
  const uint64_t bytes = fs::file_size(path, error);
  if (error) {
    return path + ": " +
           (error == std::errc::no_such_file_or_directory ? "is missing" : error.message()) +
           ", expected " + grouped(file.bytes) + " bytes by " + kManifestName;
  }
  if (bytes != file.bytes) {
    return path + ": " + grouped(bytes) + " bytes, but " + kManifestName + " lists " +
           grouped(file.bytes) + (bytes < file.bytes ? "; it looks cut short" : "");
  }
  if (scrutiny == Scrutiny::kContents || bytes <= kSmallBytes ||
      (scrutiny == Scrutiny::kWeights && file.name.starts_with("model."))) {
    const std::string checksum = content_hash(MappedFile(path).bytes());
    if (checksum != file.checksum) {
      return path + ": checksum " + checksum + ", but " + kManifestName + " lists " +
             file.checksum + "; its contents have changed";
    }
  }
  return "";
}

// What a checkpoint lacks that its manifest does not list.
std::string find_unlisted(const fs::path& checkpoint, const Manifest& manifest) {
  const std::string path = (checkpoint / kManifestName).string();
  for (const char* stem : {"config.", "trainer.", "model.", "optimizer."}) {
    if (std::ranges::none_of(manifest.files, [&](const ManifestFile& file) {
          return file.name.starts_with(stem);
        })) {
      return path + ": lists no file " + stem + "*";
    }
  }
  return "";
}

}  // namespace

std::string to_json(const Manifest& manifest) {
  auto files = nlohmann::ordered_json::array();
  for (const ManifestFile& file : manifest.files) {
    files.push_back({{"name", file.name}, {"bytes", file.bytes}, {"xxh3_128", file.checksum}});
  }
  const nlohmann::ordered_json json = {{"step", manifest.step},
                                       {"processes", manifest.processes},
                                       {"rookery", manifest.version},
                                       {"files", files}};
  return json.dump(2) + "\n";
}

Manifest read_manifest(const std::string& checkpoint) {
  const std::string path = (fs::path(checkpoint) / kManifestName).string();
  try {
    const nlohmann::json json = parse_json(
        read_text_file(path, kMaxManifestBytes), path, "expected the manifest of a checkpoint");
    Manifest manifest{.step = json.at("step"),
                      .processes = json.at("processes"),
                      .version = json.at("rookery"),
                      .files = {}};
    for (const nlohmann::json& file : json.at("files")) {
      manifest.files.push_back(
          {.name = file.at("name"), .bytes = file.at("bytes"), .checksum = file.at("xxh3_128")});
      const std::string& name = manifest.files.back().name;
      if (fs::path(name).filename() != name) {
        throw std::runtime_error(path + ": lists \"" + name +
                                 "\", expected names of files beside it");
      }
    }
    return manifest;
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(path + ": not the manifest of a checkpoint: " + error.what());
  }
}

std::string find_damage(const std::string& checkpoint, Scrutiny scrutiny) {
  const fs::path folder(checkpoint);
  try {
    if (!fs::exists(folder / kManifestName)) {
      return find_damage_of_old(folder);
    }
    const Manifest manifest = read_manifest(checkpoint);
    if (std::string damage = find_unlisted(folder, manifest); !damage.empty()) {
      return damage;
    }
    for (const ManifestFile& file : manifest.files) {
      if (std::string damage = find_damage(folder, file, scrutiny); !damage.empty()) {
        return damage;
      }
    }
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

std::string find_damage_of_model(const std::string& path) {
  const bool is_checkpoint = fs::exists(fs::path(path) / kManifestName) || had_manifest(path);
  return is_checkpoint ? find_damage(path, Scrutiny::kWeights) : "";
}

}  // namespace rwkv
