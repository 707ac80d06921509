// Ranks and masters out of what torchrun, SLURM and Open MPI put into the environment.
#include <stdexcept>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "train/distributed/placement.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;

Variables with(Variables variables, const Variables& others) {
  for (const auto& [name, value] : others) {
    variables[name] = value;
  }
  return variables;
}
Variables without(Variables variables, const std::string& name) {
  variables.erase(name);
  return variables;
}

std::string refusal(const Variables& variables) {
  return THROWN_TEXT(std::invalid_argument, placement_from(variables));
}

const Variables kTorchrun = {{"RANK", "5"},
                             {"WORLD_SIZE", "8"},
                             {"LOCAL_RANK", "1"},
                             {"LOCAL_WORLD_SIZE", "4"},
                             {"MASTER_ADDR", "node01"},
                             {"MASTER_PORT", "29500"}};

const Variables kSlurm = {{"SLURM_JOB_ID", "1234567"},
                          {"SLURM_STEP_ID", "0"},
                          {"SLURM_PROCID", "5"},
                          {"SLURM_NTASKS", "8"},
                          {"SLURM_LOCALID", "1"},
                          {"SLURM_NODEID", "1"},
                          {"SLURM_TASKS_PER_NODE", "4(x2)"},
                          {"SLURM_JOB_NODELIST", "node[03-04]"}};

const Variables kOpenMpi = {{"OMPI_COMM_WORLD_RANK", "5"},
                            {"OMPI_COMM_WORLD_SIZE", "8"},
                            {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                            {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"},
                            {"MASTER_ADDR", "node01"},
                            {"MASTER_PORT", "29500"}};

// What all three of these say.
Placement fifth_of_eight(const std::string& source) {
  return {.rank = 5,
          .world_size = 8,
          .local_rank = 1,
          .local_size = 4,
          .master_host = "node01",
          .master_port = 29500,
          .launcher_has_store = false,
          .source = source};
}

TEST(Placement, WithoutVariablesIsOneProcess) {
  EXPECT_EQ(placement_from({}), Placement{});
  EXPECT_EQ(placement_from({{"MASTER_ADDR", "node01"}, {"MASTER_PORT", "1"}}), Placement{});
  EXPECT_EQ(placement_from({{"RANK", ""}, {"WORLD_SIZE", ""}}), Placement{});
}

TEST(PlacementOfTorchrun, IsRead) {
  EXPECT_EQ(placement_from(kTorchrun), fifth_of_eight("torchrun"));
}

TEST(PlacementOfTorchrun, KnowsWhoStartedIt) {
  EXPECT_EQ(placement_from(with(kTorchrun, {{"ROOKERY_LAUNCHER", "1"}})),
            fifth_of_eight("rookery train --nproc"));
}

TEST(PlacementOfTorchrun, KnowsThatTheAgentListens) {
  const auto has_store = [](const char* value) {
    return placement_from(with(kTorchrun, {{"TORCHELASTIC_USE_AGENT_STORE", value}}))
        .launcher_has_store;
  };
  EXPECT_TRUE(has_store("True"));
  EXPECT_FALSE(has_store("False"));
}

TEST(PlacementOfTorchrun, OfOneProcessNeedsNoMaster) {
  const Placement one = placement_from({{"RANK", "0"}, {"WORLD_SIZE", "1"}});
  EXPECT_EQ(one, (Placement{.source = "torchrun"}));
}

TEST(PlacementOfTorchrun, NamesWhatIsMissing) {
  for (const auto& [name, value] : kTorchrun) {
    if (name != "RANK") {
      EXPECT_THAT(refusal(without(kTorchrun, name)),
                  AllOf(HasSubstr("RANK is set, but " + name + " is not"),
                        HasSubstr("for one process unset them")));
    }
  }
  EXPECT_THAT(refusal({{"WORLD_SIZE", "8"}}),
              HasSubstr("WORLD_SIZE = \"8\" is set, but RANK is not"));
  EXPECT_THAT(refusal({{"LOCAL_RANK", "0"}}),
              HasSubstr("LOCAL_RANK = \"0\" is set, but RANK is not"));
}

TEST(PlacementOfTorchrun, NamesWhatIsNoNumber) {
  for (const char* name : {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"}) {
    for (const char* bad : {"x", "1x", " 1", "-1", "1.0", "0x1", "99999999999999999999"}) {
      EXPECT_THAT(refusal(with(kTorchrun, {{name, bad}})),
                  AllOf(HasSubstr(std::string(name) + " = \"" + bad + "\""),
                        HasSubstr("expected a whole number from ")));
    }
  }
  for (const auto& [name, bad] : {std::pair("WORLD_SIZE", "0"),
                                  std::pair("LOCAL_WORLD_SIZE", "0"),
                                  std::pair("MASTER_PORT", "0"),
                                  std::pair("MASTER_PORT", "65536")}) {
    EXPECT_THAT(refusal(with(kTorchrun, {{name, bad}})),
                HasSubstr("expected a whole number from 1 to"));
  }
}

TEST(PlacementOfTorchrun, NamesContradictions) {
  EXPECT_THAT(refusal(with(kTorchrun, {{"RANK", "8"}})),
              HasSubstr("RANK = 8 and WORLD_SIZE = 8: expected RANK from 0 to 7; "));
  EXPECT_THAT(refusal({{"RANK", "1"}, {"WORLD_SIZE", "1"}}),
              HasSubstr("RANK = 1 and WORLD_SIZE = 1: expected RANK from 0 to 0"));
  EXPECT_THAT(
      refusal(with(kTorchrun, {{"LOCAL_RANK", "4"}})),
      HasSubstr("LOCAL_RANK = 4 and LOCAL_WORLD_SIZE = 4: expected LOCAL_RANK from 0 to 3"));
  EXPECT_THAT(refusal(with(kTorchrun, {{"LOCAL_WORLD_SIZE", "9"}})),
              HasSubstr("LOCAL_WORLD_SIZE = 9 is more than WORLD_SIZE = 8"));
}

TEST(PlacementOfOpenMpi, IsRead) {
  EXPECT_EQ(placement_from(kOpenMpi), fifth_of_eight("Open MPI"));
}

TEST(PlacementOfOpenMpi, OfOneProcessNeedsNoMaster) {
  const Placement one =
      placement_from({{"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_SIZE", "1"}});
  EXPECT_EQ(one, (Placement{.source = "Open MPI"}));
}

TEST(PlacementOfOpenMpi, AsksTheUserForTheMaster) {
  for (const char* name : {"MASTER_ADDR", "MASTER_PORT"}) {
    EXPECT_THAT(
        refusal(without(kOpenMpi, name)),
        AllOf(HasSubstr(std::string("OMPI_COMM_WORLD_RANK is set, but ") + name + " is not"),
              HasSubstr("-x MASTER_ADDR=host -x MASTER_PORT=29500")));
  }
}

TEST(PlacementOfOpenMpi, NamesWhatIsWrong) {
  EXPECT_THAT(refusal(with(kOpenMpi, {{"OMPI_COMM_WORLD_RANK", "9"}})),
              HasSubstr("OMPI_COMM_WORLD_RANK = 9 and OMPI_COMM_WORLD_SIZE = 8"));
  EXPECT_THAT(refusal(without(kOpenMpi, "OMPI_COMM_WORLD_RANK")),
              HasSubstr("but OMPI_COMM_WORLD_RANK is not"));
  EXPECT_THAT(refusal(with(kOpenMpi, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "many"}})),
              HasSubstr("OMPI_COMM_WORLD_LOCAL_SIZE = \"many\""));
}

TEST(PlacementOfOpenMpi, ComesBeforeThatOfTheSlurmJobAroundIt) {
  const Variables both = with(kOpenMpi, with(kSlurm, {{"SLURM_PROCID", "0"}}));
  EXPECT_EQ(placement_from(both).source, "Open MPI");
  EXPECT_EQ(placement_from(with(both, kTorchrun)).source, "torchrun");
}

TEST(PlacementOfSlurm, IsRead) {
  Placement expected = fifth_of_eight("SLURM");
  expected.master_host = "node03";
  expected.master_port = 15000 + 4567;
  EXPECT_EQ(placement_from(kSlurm), expected);
}

TEST(PlacementOfSlurm, TakesAMasterThatTheUserGives) {
  EXPECT_EQ(placement_from(with(kSlurm, {{"MASTER_ADDR", "node01"}, {"MASTER_PORT", "29500"}})),
            fifth_of_eight("SLURM"));
  EXPECT_THAT(refusal(with(kSlurm, {{"MASTER_PORT", "no"}})), HasSubstr("MASTER_PORT = \"no\""));
}

TEST(PlacementOfSlurm, HasTheMasterOnTheFirstMachineOfTheStep) {
  EXPECT_EQ(placement_from(with(kSlurm, {{"SLURM_STEP_NODELIST", "node[07,09]"}})).master_host,
            "node07");
  Variables old = without(kSlurm, "SLURM_JOB_NODELIST");
  EXPECT_THAT(refusal(old), HasSubstr("SLURM_PROCID is set, but SLURM_NODELIST is not"));
  old["SLURM_NODELIST"] = "a,b";
  EXPECT_EQ(placement_from(old).master_host, "a");
}

TEST(PlacementOfSlurm, KnowsHowManyTasksItsMachineHas) {
  const auto local_size = [](const Variables& variables) {
    return placement_from(with(kSlurm, variables)).local_size;
  };
  EXPECT_EQ(local_size({{"SLURM_TASKS_PER_NODE", "4"}, {"SLURM_NODEID", "7"}}), 4);
  EXPECT_EQ(local_size({{"SLURM_TASKS_PER_NODE", "2(x3),5"}, {"SLURM_NODEID", "2"}}), 2);
  EXPECT_EQ(local_size({{"SLURM_TASKS_PER_NODE", "2(x3),5"}, {"SLURM_NODEID", "3"}}), 5);
  EXPECT_EQ(local_size({{"SLURM_TASKS_PER_NODE", "5,2(x3)"}, {"SLURM_NODEID", "0"}}), 5);
  // What the step has, not what the job could have had.
  EXPECT_EQ(local_size({{"SLURM_STEP_TASKS_PER_NODE", "3"}, {"SLURM_NTASKS_PER_NODE", "8"}}), 3);
  const Variables no_list = without(kSlurm, "SLURM_TASKS_PER_NODE");
  EXPECT_EQ(placement_from(with(no_list, {{"SLURM_NTASKS_PER_NODE", "6"}})).local_size, 6);
  EXPECT_THAT(refusal(no_list), HasSubstr("SLURM_PROCID is set, but SLURM_NTASKS_PER_NODE is not"));
}

TEST(PlacementOfSlurm, NamesABrokenListOfTasks) {
  for (const char* bad : {"x", "4(x2", "4(xx)", "4(x0)", "(x2)", ",", "0", "-1", "4(x1),4"}) {
    EXPECT_THAT(refusal(with(kSlurm, {{"SLURM_TASKS_PER_NODE", bad}, {"SLURM_NODEID", "2"}})),
                AllOf(HasSubstr(std::string("SLURM_TASKS_PER_NODE = \"") + bad + "\""),
                      HasSubstr("expected tasks of each machine, as in 4(x2),3")));
  }
  EXPECT_THAT(refusal(with(without(kSlurm, "SLURM_NODEID"), {{"SLURM_TASKS_PER_NODE", "4,4"}})),
              HasSubstr("SLURM_TASKS_PER_NODE is set, but SLURM_NODEID is not"));
}

TEST(PlacementOfSlurm, OfOneTaskIsOneProcess) {
  const Placement one = placement_from({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "1"}});
  EXPECT_EQ(one, (Placement{.source = "SLURM"}));
}

TEST(PlacementOfSlurm, OfAShellInsideOfAJobIsOneProcess) {
  const Variables shell = without(without(kSlurm, "SLURM_PROCID"), "SLURM_STEP_ID");
  EXPECT_EQ(placement_from(shell), Placement{});
}

TEST(PlacementOfSlurm, OfABatchScriptIsOneProcessOrRefused) {
  Variables script =
      with(without(kSlurm, "SLURM_STEP_ID"), {{"ENVIRONMENT", "BATCH"}, {"SLURM_PROCID", "0"}});
  EXPECT_THAT(refusal(script),
              AllOf(HasSubstr("SLURM_NTASKS = 8, but the batch script itself started this process"),
                    HasSubstr("start it with srun, or with --nproc")));
  // srun hands the variable on.
  EXPECT_EQ(placement_from(with(script, {{"SLURM_STEP_ID", "0"}})).world_size, 8);
  // One that asked for machines and not for tasks.
  EXPECT_EQ(placement_from(without(script, "SLURM_NTASKS")), Placement{});
}

TEST(PlacementOfSlurm, NamesWhatIsMissingOrWrong) {
  for (const char* name : {"SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID"}) {
    EXPECT_THAT(refusal(without(kSlurm, name)),
                HasSubstr(std::string("SLURM_PROCID is set, but ") + name + " is not"));
    EXPECT_THAT(refusal(with(kSlurm, {{name, "1_2"}})),
                HasSubstr(std::string(name) + " = \"1_2\": expected a whole number"));
  }
  EXPECT_THAT(refusal(with(kSlurm, {{"SLURM_PROCID", "8"}})),
              HasSubstr("SLURM_PROCID = 8 and SLURM_NTASKS = 8"));
  EXPECT_THAT(refusal(with(kSlurm, {{"SLURM_LOCALID", "4"}})),
              HasSubstr("SLURM_LOCALID = 4 and SLURM_TASKS_PER_NODE = 4"));
}

TEST(FirstHost, OfAListAsSlurmWritesIt) {
  for (const auto& [list, first] : {std::pair("node03", "node03"),
                                    std::pair("node03,node04", "node03"),
                                    std::pair("node[03-05,7]", "node03"),
                                    std::pair("node[7,03-05]", "node7"),
                                    std::pair("node[12]", "node12"),
                                    std::pair("login,node[1-2]", "login"),
                                    std::pair("node[1-2],login", "node1"),
                                    std::pair("rack[2-3]-node[00-31]", "rack2-node00"),
                                    std::pair("n[1-2].example.org,x", "n1.example.org")}) {
    EXPECT_EQ(first_host("SLURM_NODELIST", list), first) << list;
  }
}

TEST(FirstHost, IsRefusedOfWhatIsNoList) {
  for (const char* list :
       {"", ",a", "node[", "node[03", "node[]", "node[-3]", "node[a-b]", "node]3", "two words"}) {
    EXPECT_THAT(THROWN_TEXT(std::invalid_argument, first_host("SLURM_NODELIST", list)),
                AllOf(HasSubstr(std::string("SLURM_NODELIST = \"") + list + "\""),
                      HasSubstr("expected a list of hosts, as in node[03-05,7]"),
                      HasSubstr("MASTER_ADDR")));
  }
}

TEST(Placement, OfThisTestIsReadFromItsEnvironment) {
  setenv("RANK", "1", 1);
  setenv("WORLD_SIZE", "1", 1);
  EXPECT_THROW(placement_from_environment(), std::invalid_argument);
  setenv("RANK", "0", 1);
  EXPECT_EQ(placement_from_environment().source, "torchrun");
  unsetenv("RANK");
  unsetenv("WORLD_SIZE");
}

}  // namespace
}  // namespace rwkv
