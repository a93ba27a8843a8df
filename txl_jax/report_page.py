"""The report of a run: one HTML page that needs no other file, no network and no script."""

import base64
import dataclasses
import itertools
import json
import math
import shlex
import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import PurePath
from xml.etree.ElementTree import Element

from txl_jax.config import Config
from txl_jax.json_values import count
from txl_jax.markup import document, element, table
from txl_jax.report_plots import Picture, timeline_of
from txl_jax.story import Event, Launch, Sample, Story

_SAMPLES = 50
"""As many are shown, the newest; the others are in samples.txt."""
_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #62676f; --line: #e3e5e8;
  --box: #f6f7f8; --page: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #dcdee1; --quiet: #9aa0a8; --line: #33363a; --box: #1d1f21; --page: #121212; }
  img { filter: invert(0.93) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 0.95rem; margin: 1.25rem 0 0.4rem; }
p { margin: 0.5rem 0; overflow-wrap: anywhere; }
.quiet, figcaption, dt, th { color: var(--quiet); }
.quiet, figcaption { font-size: 0.9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.75rem;
  margin: 1.25rem 0 0; }
dl div { background: var(--box); border-radius: 8px; padding: 0.6rem 0.8rem; }
dt { font-size: 0.8rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
dd small { display: block; font-size: 0.8rem; color: var(--quiet); }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1.25rem; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: 0.25rem; }
img { display: block; width: 100%; height: auto; }
.absent { background: var(--box); border-radius: 8px; padding: 1rem; margin: 0; }
.table { overflow-x: auto; margin: 0.5rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th { font-weight: normal; text-align: left; white-space: nowrap; }
th, td { padding: 0.3rem 1.25rem 0.3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
td.text { white-space: normal; min-width: 14rem; }
td.value { white-space: normal; max-width: 24rem; overflow-wrap: break-word; }
.number { text-align: right; }
pre { background: var(--box); border-radius: 8px; padding: 0.8rem; margin: 0.5rem 0;
  font: 0.85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: isolate; }
summary { cursor: pointer; }
"""


def page(story: Story, pictures: Sequence[Picture]) -> bytes:
    """The page, in UTF-8; `pictures` are those of `report_plots.draw`."""
    shown = {picture.name: _figure(picture) for picture in pictures}
    learning = [shown[picture.name] for picture in pictures[:4]]

    def figures(*names: str) -> Element:
        return element("div", *(shown[name] for name in names), class_="pictures")

    sections = [
        ("Learning", [element("div", *learning, class_="pictures"), *_about_curves(story)]),
        ("Final evaluation", _evaluation(story)),
        ("Throughput", [figures("throughput", "processes"), *_processes(story)]),
        ("Optimiser", [figures("learning-rate", "gradient-norm", "overflows")]),
        ("Memory", [figures("memory")]),
        ("Restarts and their causes", _restarts(story)),
        ("Cost", _cost(story)),
        ("Samples", _samples(story)),
        ("To reproduce it", _command(story)),
        ("Config", _config(story)),
    ]
    head = [
        element("h1", story.name),
        element("p", _state(story), class_="quiet"),
        *(element("p", note, class_="quiet") for note in story.damage),
        element("dl", *(_figures(story))),
    ]
    parts = [part for title, content in sections for part in (element("h2", title), *content)]
    return document(f"{story.name}: report", _STYLE, [*head, *parts])


def _figure(picture: Picture) -> Element:
    caption = element("figcaption", picture.title)
    if picture.png is None:
        return element("figure", caption, element("p", picture.about, class_="absent quiet"))
    source = f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"
    return element("figure", caption, element("img", src=source, alt=picture.about))


def _state(story: Story) -> str:
    seen = story.last_seen
    last = f"last sign of life {_time(seen)} UTC" if seen is not None else "no sign of life yet"
    begun = f"Begun {_date(story.starts[0].time)} UTC; " if story.starts else ""
    if story.evaluation:
        return f"{begun}finished; {last}."
    if not story.lines:
        return f"{begun}not finished: nothing was logged yet; {last}."
    line, goal = story.lines[-1], count(story.setting("train", "max_tokens"))
    share = f", {line.tokens / goal:.0%} of its tokens" if goal else ""
    return f"{begun}not finished: logged up to step {line.step:,}{share}; {last}."


def _figures(story: Story) -> Iterator[Element]:
    """The few numbers that are looked at first."""
    measure = story.measure
    if story.lines:
        last = story.lines[-1]
        yield _tile("Steps", f"{last.step:,}", f"{last.tokens:,} tokens")
    if sizes := story.series("sizes/params"):
        yield _tile("Parameters", f"{sizes[-1][1]:,.0f}")
    if losses := story.series("learning/loss"):
        line, loss = losses[-1]
        yield _tile("Training loss", f"{loss:.4f}", measure.progress(loss))
    if losses := story.series("learning/val_loss"):
        line, loss = min(losses, key=lambda found: found[1])
        yield _tile(
            "Lowest validation", f"{loss:.4f}", f"{measure.progress(loss)}, step {line.step:,}"
        )
    memory = f"{story.setting('model', 'mem_len')}"
    tested = story.evaluation.bits.get("test", {}) if story.evaluation else {}
    if memory in tested:
        loss = measure.text(tested[memory] * math.log(2))
        yield _tile("Test", loss, f"{measure.name}, memory {memory}")
    if speeds := story.series("times/tokens_per_sec"):
        median = statistics.median(value for _, value in speeds)
        devices = story.starts[-1].devices if story.starts else ""
        yield _tile("Median tokens/s", f"{median:,.0f}", devices)
    if story.lines:
        at_work = timeline_of(story).at_work
        yield _tile("Time at work", _duration(at_work), "pauses left out")
    restarts = story.restarts()
    lost = [restart.lost_seconds for restart in restarts if restart.lost_seconds is not None]
    yield _tile("Restarts", f"{len(restarts)}", f"{_duration(sum(lost))} lost" if lost else "")
    if (cost := _total(story)) is not None:
        yield _tile("Cost", f"${cost:,.2f}")


def _tile(name: str, value: str, more: str = "") -> Element:
    small = [element("small", more)] if more else []
    return element("div", element("dt", name), element("dd", value, *small))


def _about_curves(story: Story) -> list[Element]:
    notes = []
    if story.restarts():
        seen = "; red ones are what a watcher saw interrupt it" if story.watched else ""
        notes.append(f"Dotted lines are restarts{seen}.")
    if timeline_of(story).shortened:
        notes.append("Over time, pauses are cut short: a twentieth of the time at work at most.")
    if not story.series("learning/val_loss"):
        notes.append("There was no validation yet.")
    return [element("p", " ".join(notes), class_="quiet")] if notes else []


def _evaluation(story: Story) -> list[Element]:
    found, measure = story.evaluation, story.measure
    if not found:
        return [element("p", "There is none yet: it is made when the run has finished.")]
    lengths = list(dict.fromkeys(length for values in found.bits.values() for length in values))
    rows = [
        [
            split,
            f"{found.tokens[split]:,}" if split in found.tokens else "",
            *(
                measure.text(values[length] * math.log(2)) if length in values else ""
                for length in lengths
            ),
        ]
        for split, values in found.bits.items()
    ]
    head = [measure.name, measure.tokens, *(f"memory {length}" for length in lengths)]
    about = f"Over whole splits, with the parameters of step {found.step:,}, the best by validation"
    return [
        element("p", f"{about}. A token is predicted once."),
        table(head, rows, numbers=len(head) - 1),
        element("h3", "How the model goes on after the beginning of valid"),
        element("pre", found.sample),
    ]


def _processes(story: Story) -> list[Element]:
    if not story.signs:
        return []
    about = (
        "All processes make the same steps at the same time, so each tells the speed of the whole "
        "run. What is kept of a process is its last sign."
    )
    own = any(sign.own_ms is not None for sign in story.signs)
    head = ["process", "host", "last sign (UTC)", "step", "tokens/s", *(["own ms"] if own else [])]
    rows = [
        [
            f"{sign.process}",
            sign.host,
            _time(sign.time),
            "" if sign.step is None else f"{sign.step:,}",
            "" if sign.tokens_per_s is None else f"{sign.tokens_per_s:,.0f}",
            *([("" if sign.own_ms is None else f"{sign.own_ms:.2f}")] if own else []),
        ]
        for sign in story.signs
    ]
    parts = [element("p", about, class_="quiet"), table(head, rows, numbers=3 if own else 2)]
    if own:
        text = "own ms: a small computation that is the same on all hosts; a slow host takes longer"
        parts.append(element("p", f"{text}.", class_="quiet"))
    return parts


def _restarts(story: Story) -> list[Element]:
    restarts, watched = story.restarts(), story.watched
    unseen = "not known: no watcher looked on" if watched is None else "no watcher saw one"
    parts = []
    if restarts:
        rows = [
            [
                f"{number}",
                _date(restart.start.time),
                "; ".join(event.text or event.kind for event in restart.causes) or unseen,
                restart.start.devices,
                f"{restart.step:,}",
                "" if restart.lost_seconds is None else _duration(restart.lost_seconds),
            ]
            for number, restart in enumerate(restarts, start=1)
        ]
        head = ["", "started again (UTC)", "cause", "devices", "log kept to step", "time lost"]
        about = (
            "Time lost: from the last line of the log that was kept to the first new one, but for "
            "the time that the steps between them take."
        )
        parts += [
            _breaking("text", 2, table(head, rows, numbers=2)),
            element("p", about, class_="quiet"),
        ]
    elif story.starts:
        parts.append(element("p", "It was started once, and never again."))
    else:
        parts.append(element("p", "Not known: there is no record of its starts."))
    if watched and watched.events:
        parts += [element("h3", "What watchers saw and did"), _events(watched.events)]
    if watched and watched.damaged:
        text = f"{watched.damaged} of the watchers' events could not be read."
        parts.append(element("p", text, class_="quiet"))
    return parts


def _events(events: Sequence[Event]) -> Element:
    rows = [
        [
            _date(event.time),
            event.kind,
            event.text,
            ", ".join(map(str, event.hosts)),
            "" if event.step is None else f"{event.step:,}",
            "" if event.lost_seconds is None else _duration(event.lost_seconds),
            "" if event.cost is None else f"${event.cost:,.2f}",
        ]
        for event in events
    ]
    head = ["time (UTC)", "what", "", "hosts", "step", "time lost", "cost so far"]
    return _breaking("text", 2, table(head, rows, numbers=3))


def _breaking(kind: str, column: int, found: Element) -> Element:
    """A table with a column of what may be long, and is broken into lines."""
    for row in found.iter("tr"):
        row[column].set("class", kind)
    return found


def _cost(story: Story) -> list[Element]:
    launch, parts = story.launch, []
    if (cost := _total(story)) is not None:
        parts.append(element("p", f"${cost:,.2f} for all hosts."))
    else:
        parts.append(element("p", _no_cost(launch)))
    if launch and launch.hosts:
        rows = [
            [
                f"{host.number}",
                host.instance,
                f"{host.kind}{' spot' if host.spot else ''}",
                host.zone,
                host.state,
                "" if host.price is None else f"${host.price:,.4f}",
                f"{host.hours:,.2f}",
                "" if host.price is None else f"${host.price * host.hours:,.2f}",
            ]
            for host in launch.hosts
        ]
        head = ["host", "instance", "type", "zone", "state", "an hour", "hours", "cost"]
        about = "EC2 forgets hosts an hour after they have ended: those are not in this table"
        watched = story.watched is not None and story.watched.cost is not None
        counted = ", but a watcher has counted their cost." if watched else ", nor in the sum."
        parts += [table(head, rows, numbers=3), element("p", about + counted, class_="quiet")]
    return parts


def _total(story: Story) -> float | None:
    """US dollars of all hosts; what a watcher has counted holds those that EC2 has forgotten."""
    launched = story.launch.cost if story.launch else None
    watched = story.watched.cost if story.watched else None
    return max((cost for cost in (launched, watched) if cost is not None), default=None)


def _no_cost(launch: Launch | None) -> str:
    if launch is None:
        return "Not known: it is the launcher that knows what hosts cost, by a run's name."
    if launch.hosts:
        return "Not known: not every host's price is."
    return "Not known: EC2 forgets hosts an hour after they have ended."


def _samples(story: Story) -> list[Element]:
    if not story.samples:
        return [element("p", "There is none yet: one is written at each validation.")]
    *earlier, last = story.samples[-_SAMPLES:]
    parts = _sample(last)
    if earlier:
        left_out = len(story.samples) - 1 - len(earlier)
        more = f"; {left_out} older ones are in samples.txt" if left_out else ""
        texts = [part for sample in reversed(earlier) for part in _sample(sample)]
        summary = element("summary", f"{len(earlier)} earlier{more}")
        parts.append(element("details", summary, *texts))
    return parts


def _sample(sample: Sample) -> list[Element]:
    about = f"After step {sample.step:,}, {sample.tokens:,} tokens"
    return [element("h3", about), element("pre", sample.text)]


def _command(story: Story) -> list[Element]:
    launch, starts = story.launch, story.starts
    first = starts[0] if starts else None
    parts = []
    if revision := (first.source if first else "") or (launch.revision if launch else ""):
        commit = revision.removesuffix("-dirty")
        parts.append(element("pre", f"git checkout {shlex.quote(commit)}"))
        if commit != revision:
            text = "Files were changed beyond that commit, and the run does not tell how."
            parts.append(element("p", text))
    else:
        parts.append(element("p", "The source's commit is not known."))
    if launch and launch.command:
        parts += [element("h3", "As it was launched"), element("pre", launch.command)]
        if launch.own_corpus:
            text = "Its text came from the machine where this was typed: name that folder instead."
            parts.append(element("p", text))
    if not first:
        return [*parts, element("p", "The trainer's command is not known.")]
    parts += [
        element("h3", "As its trainer was started" + " first" * (len(starts) > 1)),
        element("pre", _portable(first.command)),
    ]
    for before, start in itertools.pairwise(starts):
        if start.command != before.command:
            parts.append(element("h3", f"From {_date(start.time)} UTC on"))
            parts.append(element("pre", _portable(start.command)))
    if first.versions:
        rows = [[name, version] for name, version in first.versions.items()]
        summary = element("summary", f"{len(rows)} versions of packages, on {first.devices}")
        parts.append(element("details", summary, table(["package", "version"], rows)))
    return parts


def _portable(command: str) -> str:
    """A command with the Python of any machine."""
    try:
        program, *words = shlex.split(command)
    except ValueError:
        return command
    return shlex.join(["python" if "python" in PurePath(program).name else program, *words])


def _config(story: Story) -> list[Element]:
    defaults = dataclasses.asdict(Config())
    settings = [
        (f"{section}.{name}", json.dumps(value), _default(defaults, section, name))
        for section, part in story.config.items()
        for name, value in part.items()
    ]
    changed = [setting for setting in settings if setting[1] != setting[2]]
    whole = [setting[:2] for setting in settings]
    head = ["setting", "value", "default"]
    every = element("summary", f"all {len(settings)} settings")
    return [
        element("p", "What differs from the defaults:"),
        _breaking("value", 1, table(head, changed)),
        element("details", every, _breaking("value", 1, table(head[:2], whole))),
    ]


def _default(defaults: dict[str, dict[str, object]], section: str, name: str) -> str:
    part = defaults.get(section, {})
    return json.dumps(part[name]) if name in part else ""


def _time(seconds: float) -> str:
    return _date(datetime.fromtimestamp(seconds, UTC))


def _date(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}"


def _duration(seconds: float) -> str:
    """As `0:12:05`, or `2 days, 3:40:00`."""
    return str(timedelta(seconds=round(seconds)))
