"""Write the embedded quiz from the fact tables in `scripts/quiz_facts`.

    python scripts/make_quiz.py            # rewrite the packaged files, the same bytes every time
    python scripts/make_quiz.py --check    # exit 1 where a packaged file differs

A fact table holds relations. A relation is `pairs` (one to one), `groups` (many subjects to one group) or
`adjectives` with `roots` (an invented language), with its wordings per direction and split. Subjects, not
single questions, are divided between training, validation and test: an unseen fact's subject occurs nowhere
in training. Order and choices come from SHA-256 of names, so the bytes depend on no random generator.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import string
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

FACTS = Path(__file__).parent / "quiz_facts"
OUTPUT = Path(__file__).parents[1] / "src" / "graphlora" / "tasks" / "quiz_data"
DOMAINS = ("geography", "science", "animals", "culture", "tavori", "town")
SPLITS = ("train", "validation", "test")
LABELS = tuple(string.ascii_uppercase[:4])
SHARES = {"train": 0.5, "validation": 0.16, "test": 0.34}
"""Share of each relation's subjects whose facts are learned, or first met in validation or in the test."""
EVALUATION_ROWS = {"validation": 18, "test": 40}
"""Rows per domain and kind (seen, unseen)."""


@dataclass(frozen=True)
class Fact:
    """One fact, with what is needed to ask it in each direction.

    Attributes:
        id: `domain/relation/subject`.
        subject: What decides the split of the fact.
        stratum: The subjects of one stratum are divided in the proportions of `SHARES`.
        fields: Values for the fields of the wordings.
        answers: Direction to right answer.
        wordings: Direction to split to wordings.
        options: Direction to possible answers; where absent, the answers of the other facts.
    """

    id: str
    subject: str
    stratum: str
    fields: dict[str, str]
    answers: dict[str, str]
    wordings: dict[str, dict[str, list[str]]]
    options: dict[str, list[str]] = field(default_factory=dict)

    @property
    def relation(self) -> str:
        """The id without the subject."""
        return self.id.rsplit("/", 1)[0]


def order_key(*parts: object) -> str:
    """A key that sorts names in an order of no meaning, the same everywhere."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


def read_facts(domain: str) -> list[Fact]:
    """All facts of a domain's table; raises `ValueError` where a table contradicts its form."""
    table = yaml.safe_load((FACTS / f"{domain}.yaml").read_text(encoding="utf-8"))
    facts = []
    for relation in table["relations"]:
        name = f"{domain}/{relation['name']}"
        if "pairs" in relation:
            facts += list(pair_facts(name, relation))
        elif "groups" in relation:
            facts += list(group_facts(name, relation))
        else:
            facts += list(phrase_facts(name, relation))
    twice = [fact for fact, times in Counter(fact.id for fact in facts).items() if times > 1]
    if twice:
        raise ValueError(f"given twice: {twice}")
    return facts


def pair_facts(name: str, relation: dict) -> Iterator[Fact]:
    """Facts of a one-to-one relation, asked in both directions."""
    pairs = relation["pairs"]
    shared = [answer for answer, times in Counter(pairs.values()).items() if times > 1]
    if shared:
        raise ValueError(f"{name}: not one to one: {shared}")
    for subject, answer in pairs.items():
        if not (isinstance(subject, str) and isinstance(answer, str)):
            raise ValueError(
                f"{name}: quote {subject!r}: {answer!r}, YAML reads it as something else than text"
            )
        yield Fact(
            id=f"{name}/{subject}",
            subject=subject,
            stratum=name,
            fields={"subject": subject, "object": answer},
            answers={"forward": answer, "backward": subject},
            wordings=relation["wordings"],
        )


def group_facts(name: str, relation: dict) -> Iterator[Fact]:
    """Facts that put a subject in one of several groups, asked forward only."""
    groups = relation["groups"]
    for group, subjects in groups.items():
        for subject in subjects:
            yield Fact(
                id=f"{name}/{subject}",
                subject=subject,
                stratum=f"{name}/{group}",
                fields={"subject": subject},
                answers={"forward": group},
                wordings=relation["wordings"],
                options={"forward": list(groups)},
            )


def phrase_facts(name: str, relation: dict) -> Iterator[Fact]:
    """One fact for each root, its adjective chosen in turn: root, then the adjective's word."""
    adjectives, roots = relation["adjectives"], relation["roots"]
    if len(set(roots.values())) < len(roots):
        raise ValueError(f"{name}: two nouns share a root")
    for number, noun in enumerate(sorted(roots, key=lambda noun: order_key(name, noun))):
        root, adjective = roots[noun], list(adjectives)[number % len(adjectives)]
        phrase = f"{root} {adjectives[adjective]}"
        yield Fact(
            id=f"{name}/{noun}",
            subject=noun,
            stratum=f"{name}/{adjective}",
            fields={"root": root, "noun": noun, "adjective": adjective, "phrase": phrase},
            answers={"forward": phrase, "backward": f"{adjective} {noun}"},
            wordings=relation["wordings"],
            options={
                "forward": [f"{root} {word}" for word in adjectives.values()],
                "backward": [f"{other} {noun}" for other in adjectives],
            },
        )


def divide_subjects(facts: Iterable[Fact]) -> dict[str, str]:
    """Subject to split, each stratum divided in the proportions of `SHARES`.

    A subject of several relations goes where the first of them puts it.
    """
    strata: dict[str, list[str]] = defaultdict(list)
    for fact in facts:
        strata[fact.stratum].append(fact.subject)
    part: dict[str, str] = {}
    for stratum, subjects in strata.items():
        free = sorted((s for s in subjects if s not in part), key=lambda s: order_key(stratum, s))
        first = round(SHARES["train"] * len(free))
        second = first + round(SHARES["validation"] * len(free))
        part |= dict.fromkeys(free[:first], "train")
        part |= dict.fromkeys(free[first:second], "validation")
        part |= dict.fromkeys(free[second:], "test")
    return part


def ask(fact: Fact, split: str, facts: list[Fact], part: dict[str, str]) -> Iterator[dict]:
    """The fact in every wording of `split`, as rows that still lack kind, gold position and id.

    Wrong choices come from facts on the same side (learned or not), so that a learned answer among unlearned
    ones gives nothing away, and no unseen name enters training as a wrong choice.
    """
    learned = part[fact.subject] == "train"
    for direction, by_split in fact.wordings.items():
        answer = fact.answers[direction]
        options = fact.options.get(direction) or [
            other.answers[direction]
            for other in facts
            if other.relation == fact.relation and (part[other.subject] == "train") == learned
        ]
        for number, wording in enumerate(by_split[split]):
            name = f"{fact.relation}/{direction}/{split}/{number}"
            wrong = sorted(set(options) - {answer}, key=lambda o: order_key(name, fact.id, o))[:3]
            if len(wrong) < 3:
                raise ValueError(f"{fact.id}: only {len(wrong)} wrong choices")
            yield {
                "question": capitalized(wording.format(**fact.fields)),
                "answer": answer,
                "wrong": wrong,
                "domain": fact.id.split("/", 1)[0],
                "fact": fact.id,
                "wording": name,
            }


def capitalized(question: str) -> str:
    """The question with a capital first letter."""
    return question[:1].upper() + question[1:]


def choose(rows: list[dict], count: int) -> list[dict]:
    """`count` of the rows: no fact a second time before every fact came once."""
    if len(rows) < count:
        raise ValueError(f"{rows[0]['domain']}: {len(rows)} questions for {count} places")
    times: Counter[str] = Counter()
    ranked = []
    for row in sorted(rows, key=lambda row: order_key(row["question"])):
        ranked.append((times[row["fact"]], order_key("choose", row["question"]), row))
        times[row["fact"]] += 1
    return [row for _, _, row in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def place_gold(rows: list[dict], kind: str) -> Iterator[dict]:
    """The rows in their final form, the gold position going round A, B, C, D."""
    for number, row in enumerate(sorted(rows, key=lambda row: order_key("gold", row["question"]))):
        position = number % 4
        text = [*row["wrong"][:position], row["answer"], *row["wrong"][position:]]
        yield {
            "question": row["question"],
            "choices": {"text": text, "label": list(LABELS)},
            "answerKey": LABELS[position],
            "domain": row["domain"],
            "kind": kind,
            "fact": row["fact"],
            "wording": row["wording"],
        }


def build() -> dict[str, list[dict]]:
    """Split name to its finished rows."""
    rows: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for domain in DOMAINS:
        facts = read_facts(domain)
        part = divide_subjects(facts)
        learned = [fact for fact in facts if part[fact.subject] == "train"]
        rows["train"] += place_gold([r for f in learned for r in ask(f, "train", facts, part)], "train")
        for split, count in EVALUATION_ROWS.items():
            new = [fact for fact in facts if part[fact.subject] == split]
            for kind, asked in (("seen", learned), ("unseen", new)):
                pool = [row for fact in asked for row in ask(fact, split, facts, part)]
                rows[split] += place_gold(choose(pool, count), kind)
    for split in SPLITS:
        ordered = sorted(rows[split], key=lambda row: order_key(split, row["question"]))
        rows[split] = [{"id": f"quiz-{split}-{n:04d}", **row} for n, row in enumerate(ordered)]
    return rows


def readme(rows: dict[str, list[dict]]) -> str:
    """The data card, with its counts."""
    counts = Counter((split, row["domain"], row["kind"]) for split in SPLITS for row in rows[split])
    columns = [("train", "train"), *((s, k) for s in ("validation", "test") for k in ("seen", "unseen"))]
    lines = [
        "| domain | facts | train | validation, seen | validation, unseen | test, seen | test, unseen |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for domain in DOMAINS:
        facts = {row["fact"] for split in SPLITS for row in rows[split] if row["domain"] == domain}
        cells = [len(facts), *(counts[split, domain, kind] for split, kind in columns)]
        lines.append(f"| {domain} | " + " | ".join(map(str, cells)) + " |")
    total = [len({row["fact"] for split in SPLITS for row in rows[split]})]
    total += [sum(counts[split, domain, kind] for domain in DOMAINS) for split, kind in columns]
    lines.append("| all | " + " | ".join(map(str, total)) + " |")
    return (FACTS / "README.template.md").read_text(encoding="utf-8").replace("{counts}", "\n".join(lines))


def files() -> dict[str, str]:
    """File name to the text that belongs in it."""
    rows = build()
    texts = {
        f"{split}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        for split in SPLITS
    }
    return texts | {"README.md": readme(rows)}


def main() -> int:
    """Write or check the files; the exit code."""
    parser = argparse.ArgumentParser(description="Write the embedded quiz from its fact tables.")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where a file differs")
    arguments = parser.parse_args()
    stale = []
    for name, text in files().items():
        path = OUTPUT / name
        if arguments.check:
            stale += [name] if not path.is_file() or path.read_bytes() != text.encode() else []
        else:
            OUTPUT.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
            print(f"wrote {path} ({len(text.splitlines())} lines)")
    if stale:
        print(f"differs from what the fact tables give: {', '.join(stale)}; run python scripts/make_quiz.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
