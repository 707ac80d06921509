"""The page of `rookery report`: that it is whole, needs nothing from elsewhere, and says the numbers."""

import html.parser
import json
import re
import shutil
import subprocess

import support

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Collects tags and text, and sees that every tag is closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def write_run(folder, steps=100, tokens_per_step=256, **config):
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "total_steps": steps, "tokens": step * tokens_per_step,
                "loss": 5 / step, "smoothed_loss": 5.25 / step, "lr": 1e-3, "grad_norm": 2.0,
                "tokens_per_s": 1234.0, "time": 1.7e9 + step, "elapsed_s": 2.0 * step,
                "mfu": 0.405, "data_wait": 0.01, "memory_bytes": 300 << 20}
        if step % 50 == 0:
            line["validation_loss"] = 0.0625
        lines.append(json.dumps(line))
    support.write_text(folder / "metrics.jsonl", lines)
    support.write_config(folder / "config.toml", model={"n_layer": 2, **config})
    return folder


class Report(support.Folder):
    def report(self, *runs):
        path = self.folder / "page.html"
        support.rookery("report", *runs, "--output", path)
        text = path.read_text(encoding="utf-8")
        page = Page(text)
        self.assertNotRegex(text, r"https?:|//[a-z]|url\(|@import|<link|\bsrc=")
        self.assertEqual({tag for tag, _ in page.tags} & {"iframe", "object", "embed", "img"}, set())
        return page

    def charts(self, page):
        """By its name, what a chart says of its axes, and its paths."""
        charts = {}
        for tag, attributes in page.tags:
            if attributes.get("class") == "plot":
                axes = attributes
            elif tag == "svg":
                paths = []
                charts[attributes["aria-label"]] = axes, paths
            elif tag == "path":
                paths.append(attributes)
        return charts

    def in_browser(self, script, width=500):
        """What a script returns at the end of the page, which has `figure`, the first chart, and
        `point`, which sends it an event of a pointer so many pixels right of its plot's left end."""
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if not browser:
            support.missing("chromium; scripts/setup.sh --tests installs it")
        page = self.folder / "scripted.html"
        page.write_text((self.folder / "page.html").read_text(encoding="utf-8") + """<script>
            const figure = document.querySelector('figure');
            const box = figure.querySelector('.plot').getBoundingClientRect();
            const point = (type, x, options) => figure.dispatchEvent(new PointerEvent(
              type, { clientX: box.left + x, bubbles: true, ...options }));
            const result = (() => {""" + script + """})();
            document.body.innerHTML = '<pre>' + JSON.stringify(result) + '</pre>';
            </script>""", encoding="utf-8")
        done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu",
                               f"--user-data-dir={self.folder / 'browser'}", f"--window-size={width},900",
                               "--dump-dom", page.as_uri()],
                              capture_output=True, timeout=120, check=True)
        return json.loads(re.search(r"<body><pre>(.*)</pre>", done.stdout.decode(), re.S)[1])

    def test_says_the_numbers_of_a_run(self):
        page = self.report(write_run(self.folder / "first"))
        for number in ("25,600", "0.0525", "0.0625", "1,234", "40.5 %", "300 MiB", "3m20s"):
            self.assertIn(number, page.text)
        self.assertEqual(len(self.charts(page)), 8)
        self.assertIn("n_layer", page.text)

    def test_draws_every_point_inside_the_picture(self):
        page = self.report(write_run(self.folder / "first"))
        _, paths = self.charts(page)["Loss over step"]
        curves = {a["data-name"]: a["d"] for a in paths if "data-name" in a}
        points = [tuple(map(float, p))
                  for p in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", curves["logged steps"])]
        self.assertEqual(len(points), 100)
        self.assertTrue(all(0 <= x <= 10000 and 0 <= y <= 10000 for x, y in points))
        self.assertEqual(sorted(points), points)
        self.assertEqual(curves["validation"].count("L"), 1)

    def test_is_read_under_the_pointer(self):
        # Logged every tenth of 30,000 steps: a place in 10,000 would be three of them.
        run = write_run(self.folder / "run", 30_000)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        kept = [line for i, line in enumerate(lines, 1) if i % 10 == 0 and "validation" not in line]
        lines[0] = json.dumps(json.loads(lines[0]) | {"validation_loss": 5.5})
        support.write_text(run / "metrics.jsonl", [lines[0], *kept])
        self.report(run)
        first, middle, last = (tip.split("\n") for tip in self.in_browser("""
            return [-30, 0.1234 * box.width, box.width + 30].map(x => {
              point('pointermove', x);
              return figure.querySelector('.tip').textContent;
            });"""))
        self.assertEqual(first[0], "step 1 (256 tokens)")
        self.assertEqual(first[3], "validation  5.5")
        step = int(re.match(r"step ([\d,]+) \(", middle[0])[1].replace(",", ""))
        self.assertEqual(step % 10, 0)
        self.assertLess(abs(step - 0.1234 * 30_000), 30)
        self.assertEqual(middle[0], f"step {step:,} ({256 * step:,} tokens)")
        self.assertAlmostEqual(float(middle[1].split("  ")[1]) * step, 5, delta=0.01)
        self.assertEqual(middle[3], "validation  5.5  at step 1")
        self.assertEqual(last[0], "step 29,990 (7,677,440 tokens)")

    def test_has_room_for_the_tokens_of_a_large_run(self):
        self.report(write_run(self.folder / "run", tokens_per_step=99 * 10**9))
        for width in range(500, 1300, 100):
            too_wide = self.in_browser("""
                return [...document.querySelectorAll('.tiles div')].filter(
                  tile => tile.scrollWidth > tile.clientWidth).map(tile => tile.textContent);""", width)
            self.assertEqual(too_wide, [], width)

    def test_prints_no_label_of_an_axis_over_another(self):
        for steps in (1, 2, 7, 1000):
            self.report(write_run(self.folder / f"run{steps}", steps, tokens_per_step=123_456))
            for width in (500, 1280):
                over = self.in_browser("""
                    return [...document.querySelectorAll('.plot')].flatMap(plot => {
                      const labels = [...plot.querySelectorAll('.x, .axis')].map(
                        label => label.getBoundingClientRect()).filter(box => box.width);
                      labels.sort((a, b) => a.left - b.left);
                      return labels.slice(1).map((b, i) => labels[i].right - b.left);
                    }).filter(pixels => pixels > 0);""", width)
                self.assertEqual(over, [], (steps, width))

    def test_keeps_the_reading_within_a_narrow_page(self):
        self.report(*(write_run(self.folder / f"{i} {'name ' * 30}") for i in range(2)))
        page, *tips = self.in_browser("""
            const width = () => document.documentElement.scrollWidth;
            return [width(), ...[0, 0.49, 0.51, 1].map(part => {
              point('pointermove', part * box.width);
              const tip = figure.querySelector('.tip').getBoundingClientRect();
              return [tip.left, tip.right, width()];
            })];""")
        for left, right, width in tips:
            self.assertGreaterEqual(left, 0)
            self.assertLessEqual(right, page)
            self.assertEqual(width, page)

    def test_shows_the_reading_of_a_tap_until_one_elsewhere(self):
        self.report(write_run(self.folder / "run"))
        shown = self.in_browser("""
            const shown = [], note = () => shown.push(document.querySelectorAll('.tip').length);
            const touch = { pointerType: 'touch' };
            point('pointerdown', 100, touch), note();
            point('pointerleave', 100, touch), note();
            document.querySelectorAll('figure')[1].dispatchEvent(
              new PointerEvent('pointerdown', { clientX: 200, bubbles: true, ...touch })), note();
            document.querySelector('h1').dispatchEvent(
              new PointerEvent('pointerdown', { bubbles: true, ...touch })), note();
            point('pointermove', 100), note();
            point('pointerleave', 100), note();
            return shown;""")
        self.assertEqual(shown, [1, 1, 1, 0, 1, 0])

    def test_draws_the_second_half_of_the_loss_apart(self):
        runs = [write_run(self.folder / name, steps) for name, steps in (("long", 100), ("short", 40))]
        for page in (self.report(runs[0]), self.report(*runs)):
            axes, paths = self.charts(page)["Loss, second half over step"]
            # From 5 / 51 or 5.25 / 51 down, and not from 5.
            self.assertLess(float(axes["data-y1"]), 0.11)
            self.assertGreater(float(axes["data-y0"]), 0.04)
            self.assertEqual((axes["data-x0"], axes["data-x1"]), ("51", "100"))
            self.assertNotIn("short", [a.get("data-name") for a in paths])
            for curve in paths[1:]:
                for y in re.findall(r"[ML][\d.]+ (-?[\d.]+)", curve["d"]):
                    self.assertTrue(0 <= float(y) <= 10000, curve)
        self.assertEqual(page.text.count("nats a token, smoothed"), 2)
        self.assertNotIn("Loss, second half over step",
                         self.charts(self.report(write_run(self.folder / "few", 18))))

    def test_escapes_what_runs_say(self):
        evil = "</pre><script>alert('x')</script>&amp; \"q\""
        run = write_run(self.folder / "<b>run", version=evil)
        support.write_text(run / "samples.jsonl", [json.dumps(
            {"step": 1, "tokens": 2, "prompt": evil, "text": "said " + evil})])
        support.write_text(run / "starts.jsonl", [json.dumps({"time": 1.7e9, "step": 0, "command": evil})])
        page = self.report(run)
        self.assertEqual([tag for tag, _ in page.tags].count("script"), 1)
        self.assertNotIn("b", {tag for tag, a in page.tags if tag == "b" and a})
        self.assertGreaterEqual(page.text.count(evil), 3)

    def test_marks_restarts(self):
        run = write_run(self.folder / "run")
        starts = [{"time": 1.7e9 + step, "step": step, "processor": "P"} for step in (0, 40, 60)]
        support.write_text(run / "starts.jsonl", map(json.dumps, starts))
        page = self.report(run)
        marks = [a for tag, a in page.tags if a.get("class", "").startswith("mark")]
        # Step 40 is none of the second half.
        self.assertEqual(len(marks), 2 * 7 + 1)
        self.assertIn("2023-11-14 22:14 UTC", page.text)

    def test_compares_runs(self):
        first = write_run(self.folder / "first", n_embd=32)
        second = write_run(self.folder / "second", tokens_per_step=512, n_embd=64)
        page = self.report(first, second)
        self.assertIn("2 runs compared", page.text)
        self.assertIn("51,200", page.text)
        # Steps of different sizes are compared over tokens.
        self.assertIn("Loss over tokens", self.charts(page))
        before_each = page.text.split("Each run")[0]
        self.assertIn("model.n_embd", before_each)
        self.assertNotIn("n_layer", before_each)

    def test_tells_runs_apart(self):
        for i in range(10):
            (self.folder / f"part{i}").mkdir()
        runs = [write_run(self.folder / f"part{i}" / ("run" if i < 2 else f"run{i}"))
                for i in range(10)]
        page = self.report(*runs)
        _, paths = self.charts(page)["Learning rate over step"]
        lines = {a["data-name"]: a["class"] for a in paths if "data-name" in a}
        self.assertEqual(list(lines), [str(run) for run in runs[:2]] + [run.name for run in runs[2:]])
        self.assertEqual(len(set(lines.values())), 10)
        # In the legend and in the tables as on the line.
        keys = [a["class"] for tag, a in page.tags if a.get("class", "").startswith("key ")]
        for line in lines.values():
            self.assertIn("key " + line, keys)
            self.assertIn("key " + line.removeprefix("line "), keys)

    def test_says_what_is_broken(self):
        run = write_run(self.folder / "run")
        with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write("nonsense\n")
        page = self.report(run)
        self.assertIn("metrics.jsonl:101: is no line that a run writes; left out", page.text)

    def test_refuses_what_is_no_run(self):
        done = support.run("report", self.folder, "--output", self.folder / "page.html")
        self.assertEqual(done.returncode, 1)
        self.assertIn("holds no metrics.jsonl", support.error_message(done.stderr))
        self.assertEqual(support.run("report", self.folder).returncode, 2)
        run = write_run(self.folder / "run")
        done = support.run("report", run, "--output", self.folder / "no" / "page.html")
        self.assertEqual(done.returncode, 1)


if __name__ == "__main__":
    support.main()
