// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>

#include "verbs/sysfs.h"

namespace rkv::verbs {

/// A tree like /sys in a temporary folder, made from tests/sysfs/<name>.txt. Its lines:
///   path<TAB>content    a file
///   path -> target      a link to a folder
///   path !              a file that cannot be read, as sysfs answers EINVAL: made a folder, which
///                       open() takes and read() refuses
class SysfsTree {
 public:
  explicit SysfsTree(const std::string& name) {
    std::string pattern = std::filesystem::temp_directory_path() / "sysfs.XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp: " + pattern);
    root_ = pattern;
    const auto list = std::filesystem::path(__FILE__).parent_path() / "sysfs" / (name + ".txt");
    std::ifstream lines(list);
    if (!lines) throw std::runtime_error("cannot read " + list.string());
    for (std::string line; std::getline(lines, line);) add(line);
  }
  ~SysfsTree() { std::filesystem::remove_all(root_); }
  SysfsTree(const SysfsTree&) = delete;
  SysfsTree& operator=(const SysfsTree&) = delete;

  [[nodiscard]] const std::filesystem::path& root() const { return root_; }

 private:
  void add(const std::string& line) {
    if (line.empty() || line.front() == '#') return;
    const auto path_end = line.find_first_of("\t ");
    const std::filesystem::path path = root_ / line.substr(0, path_end);
    std::filesystem::create_directories(path.parent_path());
    if (line.at(path_end) == '\t') {
      std::ofstream(path) << line.substr(path_end + 1) << '\n';
    } else if (line.substr(path_end) == " !") {
      std::filesystem::create_directory(path);
    } else if (line.compare(path_end, 4, " -> ") == 0) {
      const std::string target = line.substr(path_end + 4);
      std::filesystem::create_directories(path.parent_path() / target);
      std::filesystem::create_symlink(target, path);
    } else {
      throw std::runtime_error("not understood: " + line);
    }
  }

  std::filesystem::path root_;
};

/// What read_host() makes of a tree; each is read once per process.
inline Host read_tree(const std::string& name) {
  static std::map<std::string, Host> hosts;
  const auto found = hosts.find(name);
  if (found != hosts.end()) return found->second;
  return hosts.emplace(name, read_host(SysfsTree(name).root())).first->second;
}

}  // namespace rkv::verbs
