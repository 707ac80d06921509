// The launcher with shell scripts as ranks. It runs in a process of its own, as it does in the
// program: it is to be stopped and killed, and what it prints to be read.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/test_data.h"
#include "train/distributed/launcher.h"
#include "train/distributed/rank_process.h"

namespace rwkv {
namespace {

using namespace std::chrono_literals;
using testing::AllOf;
using testing::ContainsRegex;
using testing::HasSubstr;
using testing::Not;
using testing::UnorderedElementsAre;

// Beyond the time any wait takes, by far.
constexpr auto kDeadline = 30s;

class Launcher : public testing::Test {
 protected:
  void TearDown() override {
    if (launcher_ > 0) {
      kill(launcher_, SIGKILL);
      waitpid(launcher_, nullptr, 0);
    }
  }

  // A plan whose ranks run `script`, in which $DIR is the folder of the test.
  LaunchPlan plan(const std::string& script, int64_t ranks = 2) {
    return {.program = "/bin/sh",
            .arguments = {"sh", "-c", "DIR='" + folder_.path() + "'\n" + script},
            .ranks_here = ranks,
            .max_restarts = 0,
            .stop_grace = 20s,
            .fault_grace = 20s};
  }

  void start(const LaunchPlan& plan) {
    std::cout.flush();
    launcher_ = fork();
    if (launcher_ != 0) {
      return;
    }
    // The log of a test goes to stdout; here, as in the program, to stderr.
    dup2(open(folder_.path("out").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDOUT_FILENO);
    dup2(open(folder_.path("err").c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), STDERR_FILENO);
    // Whoever runs the tests may have it ignored (nohup).
    std::signal(SIGHUP, SIG_DFL);
    int code = 99;
    try {
      const LaunchResult result = launch(plan);
      test::write_file(folder_.path("restarts"), std::to_string(result.restarts));
      code = result.exit_code;
    } catch (const std::exception& error) {
      test::write_file(folder_.path("thrown"), error.what());
    }
    _exit(code);
  }
  // The exit code of the launcher; 1000 + the signal if one killed it.
  int finish() {
    int status = 0;
    const bool ended = comes_to_pass([&] { return waitpid(launcher_, &status, WNOHANG) != 0; });
    EXPECT_TRUE(ended) << "the launcher does not end";
    if (!ended) {
      return -1;
    }
    launcher_ = -1;
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status);
  }
  int run(const LaunchPlan& plan) {
    start(plan);
    return finish();
  }

  static bool comes_to_pass(const std::function<bool()>& condition) {
    const auto end = std::chrono::steady_clock::now() + kDeadline;
    while (!condition()) {
      if (std::chrono::steady_clock::now() > end) {
        return false;
      }
      std::this_thread::sleep_for(2ms);
    }
    return true;
  }
  void wait_for_file(const std::string& name) {
    ASSERT_TRUE(comes_to_pass([&] { return std::filesystem::exists(folder_.path(name)); })) << name;
  }
  void send(int signal) { kill(launcher_, signal); }
  // Whether a process is there and no zombie.
  static bool lives(const std::string& id) {
    const std::string path = "/proc/" + id + "/stat";
    return std::filesystem::exists(path) && test::read_file(path).find(") Z ") == std::string::npos;
  }
  bool all_gone(const std::vector<std::string>& files) {
    return comes_to_pass([&] {
      for (const std::string& file : files) {
        std::string id = test::read_file(folder_.path(file));
        id.resize(id.find('\n'));
        if (lives(id)) {
          return false;
        }
      }
      return true;
    });
  }
  std::string text(const std::string& name) { return test::read_file(folder_.path(name)); }
  std::vector<std::string> lines_of(const std::string& name) {
    std::vector<std::string> lines;
    std::istringstream stream(text(name));
    for (std::string line; std::getline(stream, line);) {
      lines.push_back(line);
    }
    return lines;
  }
  std::string restarts() { return text("restarts"); }
  // The log and what ranks wrote to stderr: the log's own sink writes to stdout in tests.
  std::string said() { return text("out") + text("err"); }

  test::TempFolder folder_;
  pid_t launcher_ = -1;
};

// Says in a file that the rank is there, with its process' number, and waits.
constexpr const char* kWait =
    "echo $$ > $DIR/new$RANK; mv $DIR/new$RANK $DIR/id$RANK; exec sleep 60";

TEST_F(Launcher, EndsWithZeroIfAllRanksDo) {
  EXPECT_EQ(run(plan("exit 0", 3)), 0);
  EXPECT_EQ(restarts(), "0");
}

TEST_F(Launcher, TellsRanksWhereTheyStand) {
  LaunchPlan three = plan(
      "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT "
      "$ROOKERY_LAUNCHER $ROOKERY_RESTART $OMP_NUM_THREADS -$TORCHELASTIC_USE_AGENT_STORE- "
      "> $DIR/rank$RANK",
      3);
  three.num_nodes = 4;
  three.node_rank = 2;
  three.master_host = "node01";
  three.master_port = 29500;
  setenv("OMP_NUM_THREADS", "7", 1);
  setenv("TORCHELASTIC_USE_AGENT_STORE", "True", 1);
  EXPECT_EQ(run(three), 0);
  unsetenv("OMP_NUM_THREADS");
  unsetenv("TORCHELASTIC_USE_AGENT_STORE");
  EXPECT_EQ(text("rank6"), "6 12 0 3 node01 29500 1 0 7 --\n");
  EXPECT_EQ(text("rank8"), "8 12 2 3 node01 29500 1 0 7 --\n");
}

TEST_F(Launcher, FindsAPortForRanksOfOneMachine) {
  EXPECT_EQ(run(plan("echo $MASTER_ADDR:$MASTER_PORT > $DIR/rank$RANK")), 0);
  EXPECT_THAT(text("rank0"), ContainsRegex("^127.0.0.1:[0-9]+\n$"));
  EXPECT_EQ(text("rank0"), text("rank1"));
}

TEST_F(Launcher, PrintsLinesWithTheRank) {
  EXPECT_EQ(run(plan("echo out $RANK; echo err $RANK >&2; printf 'no end %s' $RANK")), 0);
  // Of ranks at the same time, in whatever order.
  EXPECT_THAT(lines_of("out"),
              UnorderedElementsAre("out 0", "no end 0", "[1] out 1", "[1] no end 1"));
  EXPECT_THAT(lines_of("err"), UnorderedElementsAre("[0] err 0", "[1] err 1"));
  EXPECT_TRUE(text("out").ends_with('\n'));
}

TEST_F(Launcher, PrintsEmptyAndLongLines) {
  const std::string most = std::to_string(LinePipe::kMostLineBytes);
  EXPECT_EQ(run(plan("if [ $RANK = 1 ]; then echo; head -c " + most +
                     " /dev/zero | tr '\\0' a; echo; head -c " + most +
                     " /dev/zero | tr '\\0' b; echo b; echo end; fi")),
            0);
  const std::string a(LinePipe::kMostLineBytes, 'a');
  const std::string b(LinePipe::kMostLineBytes, 'b');
  EXPECT_TRUE(text("out") == "[1] \n[1] " + a + "\n[1] " + b + "\n[1] b\n[1] end\n");
}

TEST_F(Launcher, KeepsLinesOfRanksApart) {
  EXPECT_EQ(
      run(plan("i=0; while [ $i -lt 300 ]; do printf $RANK; echo $RANK$RANK; i=$((i+1)); done")),
      0);
  const std::vector<std::string> lines = lines_of("out");
  const auto zeros = std::count(lines.begin(), lines.end(), "000");
  const auto ones = std::count(lines.begin(), lines.end(), "[1] 111");
  EXPECT_EQ(zeros, 300);
  EXPECT_EQ(ones, 300);
}

TEST_F(Launcher, GivesRanksNothingToRead) {
  EXPECT_EQ(run(plan("read line || exit 0; exit 1")), 0);
}

TEST_F(Launcher, NamesTheRankThatFailsAndEndsTheOthers) {
  EXPECT_EQ(run(plan("if [ $RANK = 1 ]; then echo started >&2; echo too bad >&2; echo >&2; exit 3; "
                     "fi; exec sleep 60",
                     3)),
            3);
  EXPECT_THAT(said(),
              ContainsRegex("rank 1 \\(process [0-9]+\\) ended with exit code 3; its last "
                            "line on stderr: too bad"));
  EXPECT_THAT(said(), Not(HasSubstr("rank 0 (")));
  EXPECT_THAT(said(), HasSubstr("given up after 0 restarts"));
}

TEST_F(Launcher, NamesTheSignalThatKilledARank) {
  EXPECT_EQ(run(plan("if [ $RANK = 0 ]; then kill -KILL $$; fi; exec sleep 60")), 128 + SIGKILL);
  EXPECT_THAT(said(),
              ContainsRegex("rank 0 .* was killed by SIGKILL, by somebody or by Linux where "
                            "memory ran out; it wrote nothing to stderr"));
}

TEST_F(Launcher, KillsARankThatDoesNotEnd) {
  LaunchPlan deaf = plan(
      "if [ $RANK = 0 ]; then while [ ! -e $DIR/deaf ]; do sleep 0.01; done; exit "
      "3; fi; trap '' TERM; echo > $DIR/deaf; echo $$ > $DIR/id1; exec sleep 60");
  deaf.fault_grace = 100ms;
  EXPECT_EQ(run(deaf), 3);
  EXPECT_THAT(said(), HasSubstr("ranks 1 have not ended in the time they had; they are killed"));
  EXPECT_TRUE(all_gone({"id1"}));
}

TEST_F(Launcher, DoesNotStartAgainWhatCannotSave) {
  LaunchPlan failing = plan("exit 1");
  failing.max_restarts = 1;
  failing.run_dir = folder_.path("run");
  // Files with nothing in them, as large as the disk has room: the next one finds none.
  const auto make = [&](const std::string& name) {
    const std::filesystem::path path = folder_.path("run/checkpoints/" + name);
    std::filesystem::create_directories(path);
    test::write_file((path / "model.safetensors").string(), "");
    std::filesystem::resize_file(path / "model.safetensors",
                                 std::filesystem::space(path).available);
  };
  make("step_00000001");
  EXPECT_EQ(run(failing), 1);
  EXPECT_EQ(restarts(), "0");
  EXPECT_THAT(said(), ContainsRegex("not started again.*run/checkpoints: .*the disk is full"));
  // What is left of another save will not be in the way.
  make("partial_step_00000002");
  EXPECT_EQ(run(failing), 1);
  EXPECT_EQ(restarts(), "1");
}

TEST_F(Launcher, SaysWhatCannotBeExecuted) {
  LaunchPlan missing = plan("");
  missing.program = folder_.path("missing");
  EXPECT_EQ(run(missing), 127);
  EXPECT_THAT(said(), HasSubstr("missing: cannot be executed: No such file or directory"));
}

TEST_F(Launcher, HandsSignalsOnAndEndsWithThem) {
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) {
    std::filesystem::remove(folder_.path("id0"));
    std::filesystem::remove(folder_.path("id1"));
    const std::string code = std::to_string(128 + signal);
    LaunchPlan saving =
        plan("for s in TERM INT HUP; do trap \"echo $s > $DIR/got$RANK; exit " + code +
             "\" $s; done; echo > $DIR/id$RANK; while true; do sleep 0.01; done");
    saving.max_restarts = 3;
    start(saving);
    wait_for_file("id0");
    wait_for_file("id1");
    send(signal);
    EXPECT_EQ(finish(), 128 + signal);
    EXPECT_EQ(restarts(), "0");
    EXPECT_EQ("SIG" + text("got0"), "SIG" + std::string(sigabbrev_np(signal)) + "\n");
    EXPECT_EQ(text("got0"), text("got1"));
  }
}

TEST_F(Launcher, OfRanksThatASignalKillsEndsWithIt) {
  start(plan(kWait));
  wait_for_file("id0");
  wait_for_file("id1");
  send(SIGTERM);
  EXPECT_EQ(finish(), 128 + SIGTERM);
}

TEST_F(Launcher, HandsOnTheSignalThatOneRankGot) {
  LaunchPlan saving = plan(
      "trap 'echo > $DIR/saved$RANK; exit 143' TERM; echo $$ > $DIR/new$RANK; "
      "mv $DIR/new$RANK $DIR/id$RANK; while true; do sleep 0.01; done",
      3);
  saving.max_restarts = 3;
  start(saving);
  for (const char* name : {"id0", "id1", "id2"}) {
    wait_for_file(name);
  }
  kill(std::stoi(text("id1")), SIGTERM);
  EXPECT_EQ(finish(), 143);
  EXPECT_EQ(restarts(), "0");
  EXPECT_EQ(text("saved0") + text("saved2"), "\n\n");
}

TEST_F(Launcher, OfARunThatIsDoneWhenTheSignalComesEndsWithZero) {
  start(plan("trap 'exit 0' TERM; echo > $DIR/id$RANK; while true; do sleep 0.01; done"));
  wait_for_file("id0");
  wait_for_file("id1");
  send(SIGTERM);
  EXPECT_EQ(finish(), 0);
}

TEST_F(Launcher, EndsWithTheCodeOfARankThatCouldNotSave) {
  LaunchPlan full = plan(
      "trap 'exit $((143 - 142 * RANK))' TERM; echo > $DIR/id$RANK; while true; do "
      "sleep 0.01; done");
  full.max_restarts = 3;
  start(full);
  wait_for_file("id0");
  wait_for_file("id1");
  send(SIGTERM);
  EXPECT_EQ(finish(), 1);
  EXPECT_EQ(restarts(), "0");
  EXPECT_THAT(said(), ContainsRegex("rank 1 .* ended with exit code 1"));
}

constexpr const char* kDeaf =
    "trap '' TERM INT HUP; echo $$ > $DIR/new$RANK; mv $DIR/new$RANK $DIR/id$RANK; exec sleep 60";

TEST_F(Launcher, KillsRanksThatDoNotSaveInTime) {
  LaunchPlan deaf = plan(kDeaf);
  deaf.stop_grace = 100ms;
  start(deaf);
  wait_for_file("id0");
  wait_for_file("id1");
  send(SIGTERM);
  EXPECT_EQ(finish(), 128 + SIGKILL);
  EXPECT_THAT(said(), HasSubstr("ranks 0, 1 have not ended in the time they had"));
  EXPECT_TRUE(all_gone({"id0", "id1"}));
}

TEST_F(Launcher, KillsAllAtASecondSignalButNotASecondHangup) {
  start(plan(kDeaf));
  wait_for_file("id0");
  wait_for_file("id1");
  send(SIGHUP);
  ASSERT_TRUE(comes_to_pass([&] { return said().find("SIGHUP: all ranks") != std::string::npos; }));
  send(SIGHUP);
  std::this_thread::sleep_for(200ms);
  EXPECT_EQ(waitpid(launcher_, nullptr, WNOHANG), 0);
  send(SIGINT);
  EXPECT_EQ(finish(), 128 + SIGKILL);
  EXPECT_THAT(said(), HasSubstr("SIGINT again: all ranks are killed"));
}

TEST_F(Launcher, OnceKilledLeavesNoRanks) {
  start(plan(kDeaf, 3));
  for (const char* name : {"id0", "id1", "id2"}) {
    wait_for_file(name);
  }
  send(SIGKILL);
  EXPECT_EQ(finish(), 1000 + SIGKILL);
  EXPECT_TRUE(all_gone({"id0", "id1", "id2"}));
}

TEST_F(Launcher, LeavesNothingThatARankStarted) {
  EXPECT_EQ(run(plan("sleep 60 & echo $! > $DIR/child$RANK\n"
                     "while [ ! -s $DIR/child$((1 - RANK)) ]; do sleep 0.01; done\n"
                     "exit $((RANK * 3))")),
            3);
  EXPECT_TRUE(all_gone({"child0", "child1"}));
}

TEST_F(Launcher, StartsAllAnewAfterAFailure) {
  LaunchPlan once = plan(
      "echo $ROOKERY_RESTART >> $DIR/starts$RANK\n"
      "if [ $RANK = 1 -a $ROOKERY_RESTART -lt 2 ]; then while [ ! -s $DIR/starts0 "
      "]; do sleep 0.01; done; exit 1; fi\n"
      "if [ $ROOKERY_RESTART -lt 2 ]; then exec sleep 60; fi");
  once.max_restarts = 3;
  EXPECT_EQ(run(once), 0);
  EXPECT_EQ(restarts(), "2");
  EXPECT_EQ(text("starts1"), "0\n1\n2\n");
  EXPECT_THAT(said(),
              AllOf(HasSubstr("restart 1 of 3 from the newest checkpoint"),
                    HasSubstr("restart 2 of 3 from the newest checkpoint"),
                    Not(HasSubstr("restart 3 of 3"))));
}

TEST_F(Launcher, GivesUpAfterTwoRestartsWithoutProgress) {
  LaunchPlan hopeless = plan("exit 1");
  hopeless.max_restarts = 10;
  EXPECT_EQ(run(hopeless), 1);
  EXPECT_EQ(restarts(), "2");
  EXPECT_THAT(said(), HasSubstr("given up: 2 restarts in a row left no newer checkpoint"));
  hopeless.run_dir = folder_.path("run");
  std::filesystem::create_directories(folder_.path("run/checkpoints/step_00000005"));
  EXPECT_EQ(run(hopeless), 1);
  EXPECT_EQ(restarts(), "2");
  EXPECT_THAT(
      said(),
      HasSubstr("left no newer checkpoint than " + folder_.path("run/checkpoints/step_00000005")));
}

TEST_F(Launcher, GoesOnAsLongAsThereIsProgress) {
  // Every second start leaves a checkpoint.
  LaunchPlan slow = plan(
      "if [ $RANK = 0 ]; then n=$ROOKERY_RESTART; [ $((n % 2)) = 0 ] && mkdir -p "
      "$DIR/run/checkpoints/step_$((99999998 + n)); exit 1; fi; exec sleep 60");
  slow.run_dir = folder_.path("run");
  slow.max_restarts = 6;
  EXPECT_EQ(run(slow), 1);
  EXPECT_EQ(restarts(), "6");
  EXPECT_THAT(said(),
              AllOf(HasSubstr("restart 6 of 6 from the newest checkpoint, " +
                              folder_.path("run/checkpoints/step_100000002")),
                    HasSubstr("given up after 6 restarts; --max-restarts allows more")));
}

TEST_F(Launcher, DoesNotRestartAWrongConfiguration) {
  LaunchPlan wrong = plan("if [ $RANK = 1 ]; then exit 2; fi; exec sleep 60");
  wrong.max_restarts = 3;
  EXPECT_EQ(run(wrong), 2);
  EXPECT_EQ(restarts(), "0");
  EXPECT_THAT(said(), HasSubstr("not started again"));
}

TEST_F(Launcher, DoesNotRestartAfterASignalThatComesWhileRanksEnd) {
  LaunchPlan failing = plan(
      "if [ $RANK = 1 ]; then while [ ! -e $DIR/ready ]; do sleep 0.01; done; exit 1; fi\n"
      "trap 'echo > $DIR/ending' TERM; echo > $DIR/ready\n"
      "while [ ! -e $DIR/go ]; do sleep 0.01; done");
  failing.max_restarts = 3;
  start(failing);
  wait_for_file("ending");
  send(SIGTERM);
  ASSERT_TRUE(
      comes_to_pass([&] { return said().find("SIGTERM: all ranks") != std::string::npos; }));
  test::write_file(folder_.path("go"), "");
  EXPECT_EQ(finish(), 1);
  EXPECT_EQ(restarts(), "0");
}

TEST_F(Launcher, EndsWithAnErrorIfOutputIsLost) {
  LaunchPlan loud = plan("echo result");
  std::filesystem::create_symlink("/dev/full", folder_.path("out"));
  EXPECT_EQ(run(loud), 99);
  EXPECT_THAT(text("thrown"), HasSubstr("cannot be written to standard output"));
}

TEST_F(Launcher, LeavesSignalsAsTheyWere) {
  sigset_t before;
  sigset_t after;
  sigprocmask(SIG_SETMASK, nullptr, &before);
  EXPECT_EQ(launch(plan("exit 0")).exit_code, 0);
  sigprocmask(SIG_SETMASK, nullptr, &after);
  EXPECT_EQ(sigismember(&after, SIGTERM), sigismember(&before, SIGTERM));
  EXPECT_EQ(sigismember(&after, SIGCHLD), sigismember(&before, SIGCHLD));
}

}  // namespace
}  // namespace rwkv
