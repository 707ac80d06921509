"""TensorBoard reads our event files, and we read those of PyTorch's writer."""

import json
import math

import support


def loaded(folder):
    module = support.package("tensorboard.backend.event_processing.event_accumulator")
    accumulator = module.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


class TensorBoardReads(support.Folder):
    def write(self, resumed_step, last_step, offset=0.0):
        support.rookery("write", self.folder, resumed_step, last_step, offset)

    def test_scalars(self):
        self.write(0, 300, 0.5)
        points = loaded(self.folder).Scalars("train/loss")
        self.assertEqual([point.step for point in points], list(range(1, 301)))
        self.assertEqual([point.value for point in points], [step + 0.5 for step in range(1, 301)])
        self.assertEqual(points[9].wall_time, 1700000010)

    def test_values_that_are_not_finite(self):
        self.write(0, 2, math.inf)
        self.assertEqual([p.value for p in loaded(self.folder).Scalars("train/loss")], [math.inf] * 2)

    def test_texts(self):
        self.write(0, 2)
        accumulator = loaded(self.folder)
        self.assertEqual(accumulator.SummaryMetadata("sample").plugin_data.plugin_name, "text")
        texts = [event.tensor_proto.string_val for event in accumulator.Tensors("sample")]
        wanted = "    <b>step</b> {}\n    \N{REPLACEMENT CHARACTER}"
        self.assertEqual([[t.decode() for t in v] for v in texts], [[wanted.format(1)], [wanted.format(2)]])

    def test_a_resumed_run_replaces_the_steps_that_were_lost(self):
        self.write(0, 10)
        self.write(6, 12, 100.0)
        points = loaded(self.folder).Scalars("train/loss")
        wanted = [*range(1, 7), *(step + 100 for step in range(7, 13))]
        self.assertEqual([point.value for point in points], wanted)

    def test_a_run_that_was_killed_while_writing(self):
        self.write(0, 10)
        (path,) = self.folder.iterdir()
        path.write_bytes(path.read_bytes()[:-5])
        self.write(10, 12)
        self.assertEqual(len(loaded(self.folder).Scalars("train/loss")), 12)


class WeRead(support.Folder):
    def test_what_pytorch_writes(self):
        support.package("torch")
        tensorboard = support.package("torch.utils.tensorboard")
        with tensorboard.SummaryWriter(str(self.folder)) as writer:
            writer.add_scalar("a", 0.25, 7, walltime=1e9)
            writer.add_scalar("b", -2, 8, new_style=True)
            writer.add_text("c", "t\u00e4xt", 9)
        (path,) = self.folder.iterdir()
        events = [json.loads(line) for line in support.rookery("read", path).splitlines()]
        self.assertEqual(events[0]["version"], "brain.Event:2")
        self.assertEqual(events[1]["time"], 1e9)
        self.assertEqual([(e["step"], e["values"][0]) for e in events[1:]], [
            (7, {"tag": "a", "scalar": 0.25}),
            (8, {"tag": "b", "scalar": -2}),
            (9, {"tag": "c/text_summary", "text": "t\u00e4xt"}),
        ])


if __name__ == "__main__":
    support.main()
