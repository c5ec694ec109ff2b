"""Generators of structured and everyday text for the bundled model.

Every generator is a function from a seeded ``random.Random`` to one document. All word lists and
templates are written for this project; the proverbs and the quoted passages are traditional or in
the public domain.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from phrases import (
    ADJECTIVES,
    ADVERBS,
    ANIMALS,
    CITIES,
    CODE_NOUNS,
    CODE_SENTENCES,
    CODE_TYPES,
    COLOURS,
    COUNTRIES,
    DAYS,
    EMOJI_LINES,
    FIRST_NAMES,
    FOODS,
    FOREIGN,
    JOBS,
    LAST_NAMES,
    MONTHS,
    PASSAGES,
    PLACES,
    PROVERB_FRAMES,
    PROVERBS,
    THINGS,
    TIMES_OF_DAY,
    TOPICS,
    VERBS_ING,
    VERBS_PAST,
    WEATHER,
    WORDS_FOR_SITES,
)

Rng = random.Random
GREETINGS = ["Hello", "Good morning", "Thank you", "Of course"]
Generator = Callable[[Rng], str]


def _repeat(r: Rng, line: Callable[[Rng], str], low: int, high: int, sep: str = "\n") -> str:
    """Join a number of lines; one document in twelve is made about eight times longer."""
    count = r.randint(low, high)
    if r.random() < 1 / 12:
        count *= 8
    return sep.join(line(r) for _ in range(count))


def _either(r: Rng, *makers: Callable[[], str]) -> str:
    return r.choice(makers)()


def _price_number(r: Rng) -> float:
    return round(r.choice([9.99, 1.0, 10.0, 100.0, 1000.0]) * r.uniform(0.1, 9.99), 2)


# --------------------------------------------------------------------------- names and contacts


def person(r: Rng) -> str:
    """A name of a person, sometimes with a title or an initial."""
    first, last = r.choice(FIRST_NAMES), r.choice(LAST_NAMES)
    style = r.random()
    if style < 0.06:
        return f"{r.choice(['Dr.', 'Prof.', 'Mr.', 'Mrs.', 'Ms.'])} {first} {last}"
    if style < 0.14:
        return f"{first} {r.choice('ABCDEFGHJKLMNPRSTW')}. {last}"
    if style < 0.18:
        return f"{first} {last}-{r.choice(LAST_NAMES)}"
    return f"{first} {last}"


def names(r: Rng) -> str:
    """Lists of names."""
    style = r.randrange(4)
    if style == 0:
        return _repeat(r, person, 3, 12)
    if style == 1:
        return _repeat(r, person, 3, 8, ", ") + "."
    if style == 2:
        return _repeat(r, lambda q: f"{q.choice(LAST_NAMES)}, {q.choice(FIRST_NAMES)}", 3, 12)
    return _repeat(
        r, lambda q: f"{person(q)} is a {q.choice(JOBS)} from {q.choice(CITIES)}.", 2, 8, " "
    )


def _ascii_word(text: str) -> str:
    return "".join(c for c in text.lower() if c.isascii() and c.isalnum()) or "user"


def domain(r: Rng) -> str:
    """A host name."""
    name = r.choice(WORDS_FOR_SITES)
    if r.random() < 0.3:
        name += r.choice(["", "-"]) + r.choice(WORDS_FOR_SITES)
    return f"{name}.{r.choice(['com', 'com', 'org', 'org', 'net', 'io', 'edu', 'co.uk', 'de'])}"


def email(r: Rng) -> str:
    """An e-mail address."""
    first, last = _ascii_word(r.choice(FIRST_NAMES)), _ascii_word(r.choice(LAST_NAMES))
    local = r.choice([f"{first}.{last}", f"{first}{last[:1]}", f"{first[:1]}{last}", first, last])
    if r.random() < 0.2:
        local += str(r.randint(1, 99))
    host = "example.com" if r.random() < 0.3 else domain(r)
    return f"{local}@{host}"


def url(r: Rng) -> str:
    """A web address."""
    parts = "/".join(r.choice(WORDS_FOR_SITES) for _ in range(r.randint(0, 3)))
    tail = r.choice(
        ["", "", "/", ".html", f"?id={r.randint(1, 9999)}", f"?page={r.randint(1, 20)}"]
    )
    host = r.choice(["www.", "", "docs.", "api."]) + domain(r)
    return f"{r.choice(['https', 'https', 'http'])}://{host}/{parts}{tail}"


def contacts(r: Rng) -> str:
    """Lines with addresses of all sorts."""

    def one(q: Rng) -> str:
        return _either(
            q,
            lambda: email(q),
            lambda: f"{person(q)} <{email(q)}>",
            lambda: url(q),
            lambda: f"You can write to {email(q)} or visit {url(q)} for more information.",
            lambda: f"Contact: {email(q)}",
            lambda: f"See {url(q)} for details.",
            lambda: f"Phone: +{q.randint(1, 98)} {q.randint(100, 999)} {q.randint(1000, 9999)}",
            lambda: f"mailto:{email(q)}",
            lambda: ".".join(str(q.randint(0, 255)) for _ in range(4)),
        )

    return _repeat(r, one, 2, 9)


# --------------------------------------------------------------------------------- dates, times


def iso_date(r: Rng) -> str:
    """A date such as 2001-02-03."""
    return f"{r.randint(1950, 2035)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}"


def clock(r: Rng) -> str:
    """A time of day."""
    return r.choice(
        [
            f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}",
            f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}:{r.randint(0, 59):02d}",
            f"{r.randint(1, 12)}:{r.choice([0, 15, 30, 45]):02d} {r.choice(['am', 'pm'])}",
        ]
    )


def iso_stamp(r: Rng) -> str:
    """A date and time in ISO 8601."""
    zone = r.choice(["Z", "Z", "+00:00", "+01:00", "-05:00", ""])
    return (
        f"{iso_date(r)}T{r.randint(0, 23):02d}:{r.randint(0, 59):02d}:{r.randint(0, 59):02d}{zone}"
    )


def written_date(r: Rng) -> str:
    """A date as people write it."""
    day, month, year = r.randint(1, 28), r.choice(MONTHS), r.randint(1900, 2035)
    return r.choice(
        [
            f"{day} {month} {year}",
            f"{month} {day}, {year}",
            f"{r.choice(DAYS)}, {day} {month} {year}",
            f"{r.choice(DAYS)}, {month} {day}, {year}",
            f"{day:02d}/{r.randint(1, 12):02d}/{year}",
            f"{day:02d}-{month[:3]}-{year}",
        ]
    )


def dates(r: Rng) -> str:
    """Dates and times, bare or in sentences."""

    def sentence(q: Rng) -> str:
        return _either(
            q,
            lambda: f"The meeting is on {written_date(q)} at {clock(q)}.",
            lambda: f"{person(q)} was born on {written_date(q)} in {q.choice(CITIES)}.",
            lambda: f"The deadline is {written_date(q)}.",
            lambda: f"Date: {written_date(q)}",
            lambda: f"Today is {q.choice(DAYS)}, {q.choice(MONTHS)} {q.randint(1, 28)}.",
            lambda: f"The shop is open from {clock(q)} to {clock(q)}.",
            lambda: f"The train leaves at {clock(q)} and arrives at {clock(q)}.",
            lambda: (
                f"Version {q.randint(0, 9)}.{q.randint(0, 20)} was released on {written_date(q)}."
            ),
        )

    style = r.randrange(5)
    lines: list[Generator] = [iso_date, written_date, sentence, iso_stamp, clock]
    if style == 2 or r.random() < 0.4:
        return _repeat(r, sentence, 2, 8, r.choice(["\n", " "]))
    return _repeat(r, lines[style], 3, 12)


# ------------------------------------------------------------------------------ money, addresses


def price(r: Rng) -> str:
    """An amount of money."""
    value = _price_number(r)
    return r.choice(
        [
            f"${value:,.2f}",
            f"${value:,.2f}",
            f"€{value:,.2f}",
            f"£{value:,.2f}",
            f"¥{int(value * 100):,}",
            f"{value:,.2f} €",
            f"{value:.2f} USD",
            f"CHF {value:.2f}",
            f"₹{int(value * 10):,}",
        ]
    )


def prices(r: Rng) -> str:
    """Lines about prices."""

    def one(q: Rng) -> str:
        thing = q.choice(THINGS + FOODS)
        return _either(
            q,
            lambda: f"{thing.capitalize()}: {price(q)}",
            lambda: f"The {thing} costs {price(q)}.",
            lambda: f"{q.randint(1, 12)} x {thing} @ {price(q)}",
            lambda: f"Total: {price(q)}",
            lambda: f"The price of the {thing} went from {price(q)} to {price(q)}.",
            lambda: f"A {thing} for {price(q)} is {q.choice(['a bargain', 'too expensive'])}.",
            lambda: f"Discount: {q.choice([5, 10, 15, 20, 25, 50])}%",
        )

    return _repeat(r, one, 2, 9)


def address(r: Rng) -> str:
    """A postal address."""
    street = r.choice(LAST_NAMES + [c.capitalize() for c in WORDS_FOR_SITES])
    kind = r.choice(["Street", "Road", "Avenue", "Lane", "Square"])
    return (
        f"{person(r)}\n{r.randint(1, 250)} {street} {kind}\n"
        f"{r.randint(10000, 99999)} {r.choice(CITIES)}\n{r.choice(COUNTRIES)}"
    )


# -------------------------------------------------------------------------------------- records


def _json_value(r: Rng, depth: int) -> object:
    roll = r.random()
    if depth > 0 and roll < 0.12:
        return _json_object(r, depth - 1)
    if depth > 0 and roll < 0.22:
        makers: list[Callable[[], object]] = [
            lambda: r.randint(0, 100),
            lambda: r.choice(COLOURS),
            lambda: person(r),
        ]
        maker = r.choice(makers)
        return [maker() for _ in range(r.randint(0, 5))]
    return r.choice([r.randint(0, 1000), round(r.uniform(0, 100), 2), True, False, None, word(r)])


def word(r: Rng) -> str:
    """A common noun or a colour."""
    return r.choice(THINGS + FOODS + ANIMALS + COLOURS)


def _json_object(r: Rng, depth: int) -> dict[str, object]:
    fields: list[tuple[str, Callable[[], object]]] = [
        ("id", lambda: r.randint(1, 99999)),
        ("name", lambda: person(r)),
        ("first_name", lambda: r.choice(FIRST_NAMES)),
        ("last_name", lambda: r.choice(LAST_NAMES)),
        ("age", lambda: r.randint(1, 99)),
        ("email", lambda: email(r)),
        ("active", lambda: r.random() < 0.6),
        ("date", lambda: iso_date(r)),
        ("created_at", lambda: iso_stamp(r)),
        ("price", lambda: _price_number(r)),
        ("currency", lambda: r.choice(["USD", "EUR", "GBP", "JPY"])),
        ("quantity", lambda: r.randint(1, 50)),
        ("city", lambda: r.choice(CITIES)),
        ("country", lambda: r.choice(COUNTRIES)),
        ("title", lambda: f"The {r.choice(ADJECTIVES)} {word(r)}"),
        ("tags", lambda: [word(r) for _ in range(r.randint(0, 4))]),
        ("scores", lambda: [r.randint(0, 100) for _ in range(r.randint(1, 6))]),
        ("values", lambda: [round(r.uniform(-10, 10), 3) for _ in range(r.randint(1, 5))]),
        ("url", lambda: url(r)),
        ("color", lambda: r.choice(COLOURS)),
        ("status", lambda: r.choice(["ok", "error", "pending", "done", "active", "closed"])),
        ("error", lambda: None),
        ("items", lambda: [_json_object(r, 0) for _ in range(r.randint(1, 3))]),
        ("address", lambda: {"city": r.choice(CITIES), "zip": str(r.randint(10000, 99999))}),
        ("user", lambda: {"id": r.randint(1, 999), "name": person(r)}),
        ("type", lambda: r.choice(["string", "integer", "object", "array", "boolean"])),
        ("data", lambda: _json_value(r, depth)),
        ("enabled", lambda: r.random() < 0.5),
        ("description", lambda: sentence_everyday(r)),
    ]
    chosen = r.sample(fields, r.randint(2, 7))
    if depth <= 0:
        chosen = [f for f in chosen if f[0] not in ("items", "data", "user", "address")] or fields[
            :2
        ]
    if r.random() < 0.5:
        chosen.sort(key=lambda f: fields.index(f))
    return {key: make() for key, make in chosen}


def json_records(r: Rng) -> str:
    """JSON in several styles."""
    style = r.random()
    ascii_only = r.random() < 0.2
    if style < 0.45:
        return _repeat(r, lambda q: json.dumps(_json_object(q, 2), ensure_ascii=ascii_only), 1, 6)
    if style < 0.75:
        return json.dumps(_json_object(r, 3), ensure_ascii=ascii_only, indent=r.choice([2, 2, 4]))
    if style < 0.9:
        rows = [_json_object(r, 1) for _ in range(r.randint(1, 5))]
        return json.dumps(rows, ensure_ascii=ascii_only, indent=r.choice([None, 2]))
    return _repeat(
        r,
        lambda q: json.dumps(_json_object(q, 1), ensure_ascii=ascii_only, separators=(",", ":")),
        1,
        6,
    )


def csv_lines(r: Rng) -> str:
    """A table with a header."""
    columns: dict[str, Generator] = {
        "id": lambda q: str(q.randint(1, 9999)),
        "name": person,
        "age": lambda q: str(q.randint(1, 99)),
        "city": lambda q: q.choice(CITIES),
        "date": iso_date,
        "email": email,
        "price": lambda q: f"{_price_number(q):.2f}",
        "quantity": lambda q: str(q.randint(1, 100)),
        "country": lambda q: q.choice(COUNTRIES),
        "product": word,
        "score": lambda q: f"{q.uniform(0, 1):.3f}",
        "color": lambda q: q.choice(COLOURS),
        "active": lambda q: q.choice(["true", "false"]),
    }
    keys = r.sample(list(columns), r.randint(3, 6))
    sep = r.choice([",", ",", ",", ";", "\t"])
    header = sep.join(keys)
    return header + "\n" + _repeat(r, lambda q: sep.join(columns[k](q) for k in keys), 3, 14)


def key_values(r: Rng) -> str:
    """Settings, forms, logs and postal addresses."""

    def title_pair(q: Rng) -> str:
        pairs: list[tuple[str, Generator]] = [
            ("Name", person),
            ("Email", email),
            ("Date", written_date),
            ("Time", clock),
            ("Subject", lambda s: sentence_everyday(s)[:-1]),
            ("Price", price),
            ("City", lambda s: s.choice(CITIES)),
            ("Colour", lambda s: s.choice(COLOURS)),
            ("Status", lambda s: s.choice(["open", "closed", "in progress", "done"])),
            ("Website", url),
            ("Occupation", lambda s: s.choice(JOBS)),
            ("Weight", lambda s: f"{s.uniform(0.1, 90):.1f} kg"),
            ("Temperature", lambda s: f"{s.randint(-20, 40)} °C"),
            ("Answer", lambda s: s.choice(["yes", "no", "maybe"])),
            ("Notes", sentence_everyday),
        ]
        key, make = q.choice(pairs)
        return f"{key}: {make(q)}"

    def setting(q: Rng) -> str:
        key = f"{q.choice(CODE_NOUNS)}_{q.choice(['size', 'name', 'path', 'limit', 'count'])}"
        value = q.choice([str(q.randint(0, 4096)), q.choice(["true", "false"]), f'"{word(q)}"'])
        return f"{key} = {value}"

    def yaml_pair(q: Rng) -> str:
        return f"{q.choice(CODE_NOUNS)}: {q.choice([str(q.randint(0, 99)), word(q), 'null'])}"

    def log_line(q: Rng) -> str:
        level = q.choice(["INFO", "INFO", "DEBUG", "WARNING", "ERROR"])
        noun = q.choice(CODE_NOUNS)
        text = q.choice(
            [
                f"{noun} started",
                f"{noun} finished in {q.uniform(0, 9):.2f} s",
                f"could not open {noun}.txt",
                f"{q.randint(1, 500)} {noun}s processed",
                f"connection to {domain(q)} closed",
            ]
        )
        return f"{iso_date(q)} {q.randint(0, 23):02d}:{q.randint(0, 59):02d} {level} {text}"

    style = r.randrange(6)
    if style == 0:
        return f"[{r.choice(CODE_NOUNS)}]\n" + _repeat(r, setting, 2, 8)
    if style == 1:
        return _repeat(r, yaml_pair, 3, 8)
    if style == 2:
        return _repeat(r, log_line, 3, 10)
    if style == 3:
        return _repeat(r, address, 1, 3, "\n\n")
    return _repeat(r, title_pair, 3, 9)


def sql(r: Rng) -> str:
    """SQL statements."""
    tables = {
        "users": ["id", "name", "email", "age", "city", "created_at"],
        "orders": ["id", "user_id", "product_id", "quantity", "total", "date"],
        "products": ["id", "name", "price", "color", "stock"],
        "employees": ["id", "name", "salary", "department", "hired"],
        "books": ["id", "title", "author", "year", "pages"],
    }

    def literal(q: Rng, column: str) -> str:
        if column in ("name", "author"):
            return "'" + person(q).replace("'", "''") + "'"
        if column in ("email", "city", "color", "title", "department"):
            table = {"email": email(q), "city": q.choice(CITIES), "color": q.choice(COLOURS)}
            return "'" + table.get(column, word(q)).replace("'", "''") + "'"
        if column in ("created_at", "date", "hired"):
            return f"'{iso_date(q)}'"
        return str(q.randint(1, 2000))

    def where(q: Rng, columns: list[str]) -> str:
        column = q.choice(columns)
        value = literal(q, column)
        operator = "=" if value.startswith("'") else q.choice(["=", ">", "<", ">=", "<="])
        return f" WHERE {column} {operator} {value}"

    def statement(q: Rng) -> str:
        table = q.choice(list(tables))
        columns = tables[table]
        roll = q.random()
        if roll < 0.45:
            what = q.choice(["*", "*", "COUNT(*)", ", ".join(q.sample(columns, q.randint(1, 3)))])
            tail = where(q, columns) if q.random() < 0.7 else ""
            if q.random() < 0.3:
                tail += f" ORDER BY {q.choice(columns)}{q.choice(['', ' DESC', ' ASC'])}"
            if q.random() < 0.25:
                tail += f" LIMIT {q.choice([1, 5, 10, 20, 100])}"
            return f"SELECT {what} FROM {table}{tail};"
        if roll < 0.55:
            return (
                "SELECT u.name, o.total FROM users u JOIN orders o ON u.id = o.user_id"
                f" WHERE o.total > {q.randint(1, 500)};"
            )
        if roll < 0.75:
            picked = q.sample(columns[1:], q.randint(2, 4))
            values = ", ".join(literal(q, c) for c in picked)
            return f"INSERT INTO {table} ({', '.join(picked)}) VALUES ({values});"
        if roll < 0.88:
            column = q.choice(columns[1:])
            return f"UPDATE {table} SET {column} = {literal(q, column)}{where(q, columns)};"
        if roll < 0.95:
            return f"DELETE FROM {table}{where(q, columns)};"
        return f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, {columns[1]} TEXT NOT NULL);"

    return _repeat(r, statement, 1, 7)


# --------------------------------------------------------------------------- molecules and chess


def _smiles(r: Rng) -> str:
    rings = ["c1ccccc1", "C1CCCCC1", "c1ccncc1", "c1ccc2ccccc2c1", "C1CCNCC1", "c1ccsc1", "C1CC1"]
    groups = ["O", "N", "F", "Cl", "Br", "C#N", "C(=O)O", "C(=O)N", "OC", "[N+](=O)[O-]", "S", "I"]
    atoms = ["C", "C", "C", "C", "CC", "N", "O", "C=C", "S", "C(=O)", "[C@H](C)", "C(=O)N"]
    known = [
        "CCO",
        "CC(=O)O",
        "CC(=O)Oc1ccccc1C(=O)O",
        "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
        "c1ccccc1",
        "CC(C)Cc1ccc(cc1)C(C)C(=O)O",
        "CC(=O)Nc1ccc(O)cc1",
        "OCC1OC(O)C(O)C(O)C1O",
    ]
    if r.random() < 0.1:
        return r.choice(known)
    text = ""
    for _ in range(r.randint(2, 7)):
        roll = r.random()
        if roll < 0.25:
            text += r.choice(rings)
        elif roll < 0.45 and text:
            text += f"({r.choice(groups)})" if text[-1] in "CN" else "C"
        else:
            text += r.choice(atoms)
    return text + r.choice(["", "", *groups])


def smiles(r: Rng) -> str:
    """Strings that look like SMILES."""
    return _repeat(r, _smiles, 4, 14, r.choice(["\n", "\n", " "]))


def chess(r: Rng) -> str:
    """Moves as in a chess score (an opening, then moves that need not be legal)."""
    openings = [
        ["e4", "e5", "Nf3", "Nc6", "Bb5", "a6", "Ba4", "Nf6", "O-O", "Be7"],
        ["e4", "c5", "Nf3", "d6", "d4", "cxd4", "Nxd4", "Nf6", "Nc3", "a6"],
        ["d4", "d5", "c4", "e6", "Nc3", "Nf6", "Bg5", "Be7", "e3", "O-O"],
        ["d4", "Nf6", "c4", "g6", "Nc3", "Bg7", "e4", "d6", "Nf3", "O-O"],
        ["e4", "e5", "Nf3", "Nc6", "Bc4", "Bc5", "c3", "Nf6", "d3", "d6"],
        ["e4", "e6", "d4", "d5", "Nc3", "Nf6", "Bg5", "Be7", "e5", "Nfd7"],
        ["c4", "e5", "Nc3", "Nf6", "g3", "d5", "cxd5", "Nxd5", "Bg2", "Nb6"],
    ]
    moves = r.choice(openings)[: r.randint(4, 10)]
    for _ in range(r.randint(4, 40)):
        square = r.choice("abcdefgh") + r.choice("12345678")
        capture = "x" if r.random() < 0.2 else ""
        piece = r.choice(["N", "B", "R", "Q", "K", "", ""])
        if not piece and capture:
            piece = r.choice("abcdefgh")
        moves = [*moves, piece + capture + square + ("+" if r.random() < 0.08 else "")]
    text = ""
    for index, move in enumerate(moves):
        text += f"{index // 2 + 1}. {move} " if index % 2 == 0 else f"{move} "
    return text + r.choice(["1-0", "0-1", "1/2-1/2"])


def arithmetic(r: Rng) -> str:
    """Small sums and sequences of numbers."""

    def one(q: Rng) -> str:
        a, b = q.randint(0, 20), q.randint(1, 12)
        return q.choice(
            [
                f"{a} + {b} = {a + b}",
                f"{a + b} - {b} = {a}",
                f"{a} x {b} = {a * b}",
                f"{a * b} / {b} = {a}",
                f"{a} plus {b} is {a + b}.",
                f"{b} squared is {b * b}.",
            ]
        )

    if r.random() < 0.3:
        start, step = r.randint(0, 20), r.randint(1, 5)
        return ", ".join(str(start + step * i) for i in range(r.randint(5, 30)))
    return _repeat(r, one, 3, 10)


# ------------------------------------------------------------------------------ everyday English


def sentence_everyday(r: Rng) -> str:
    """One everyday sentence."""
    first, other = r.choice(FIRST_NAMES), r.choice(FIRST_NAMES)
    adj, adj2 = r.choice(ADJECTIVES), r.choice(ADJECTIVES)
    thing, food, animal = r.choice(THINGS), r.choice(FOODS), r.choice(ANIMALS)
    place, time = r.choice(PLACES), r.choice(TIMES_OF_DAY)
    verb, doing, adverb = r.choice(VERBS_PAST), r.choice(VERBS_ING), r.choice(ADVERBS)
    who = r.choice(
        [first, f"The {r.choice(JOBS)}", f"My {r.choice(['mother', 'friend', 'sister'])}"]
    )
    pron = r.choice(["He", "She", "They", "We", "I"])
    return _either(
        r,
        lambda: f"{who} {verb} the {adj} {thing} in the {place}.",
        lambda: f"{pron} {verb} the {thing} {time}.",
        lambda: f"{time.capitalize()}, {first} {verb} a {adj} {thing}.",
        lambda: f"The {animal} was {doing} {adverb} near the {place}.",
        lambda: f"The {adj} {animal} ran into the {place}.",
        lambda: f"The {adj} {animal} jumps over the {adj2} {r.choice(ANIMALS)}.",
        lambda: f"{first} and {other} went to the {place} to buy some {food}.",
        lambda: f"The weather in {r.choice(CITIES)} is {r.choice(WEATHER)} today.",
        lambda: f"It was a {r.choice(WEATHER)} day, and the {place} was {adj}.",
        lambda: f"I would like to have some {food} and a cup of {r.choice(['tea', 'coffee'])}.",
        lambda: f"{first} likes {food}, but {other} likes {r.choice(FOODS)}.",
        lambda: f"Where is the {thing}? It is in the {place}.",
        lambda: f'"{r.choice(["Hello", "Good morning", "Thank you", "Of course"])}," said {first}.',
        lambda: f'"I have lost my {thing}," said {first} {adverb}.',
        lambda: f"She said that the {thing} was {adj} and {adj2}.",
        lambda: f"There are {r.randint(2, 12)} {animal}s in the {place}.",
        lambda: f"The {thing} is {adj}, and the {r.choice(THINGS)} is {adj2}.",
        lambda: f"{first} lives in {r.choice(CITIES)} and works as a {r.choice(JOBS)}.",
        lambda: f"The capital of the country is a {adj} city.",
        lambda: (
            f"Do you know where {first} is? I think {r.choice(['he', 'she'])} is in the {place}."
        ),
        lambda: f"We have been {doing} since {r.choice(DAYS)}.",
        lambda: f"If it is {r.choice(WEATHER)} tomorrow, we will go to the {place}.",
        lambda: f"My favourite colour is {r.choice(COLOURS)}.",
        lambda: f"The {r.choice(COLOURS)} {thing} belongs to {first}.",
        lambda: f"{first} does not want to talk about {r.choice(TOPICS)}.",
        lambda: f"This book is about {r.choice(TOPICS)} and {r.choice(TOPICS)}.",
        lambda: f"Please put the {thing} on the table and close the door.",
        lambda: f"I don't know what to do with this {thing}.",
        lambda: f"They couldn't find the {thing}, so they {verb} the {r.choice(THINGS)}.",
        lambda: f"Once upon a time there was a {adj} {animal} who lived in a {place}.",
    )


def sentence_code(r: Rng) -> str:
    """One sentence as in the documentation of a program."""
    template = r.choice(CODE_SENTENCES)
    return template.format(
        noun=r.choice(CODE_NOUNS),
        noun2=r.choice(CODE_NOUNS),
        type=r.choice(CODE_TYPES),
        type2=r.choice(CODE_TYPES),
        number=r.choice(["0", "1", "2", "10", "100", "-1", "None"]),
    )


def everyday(r: Rng) -> str:
    """Everyday sentences."""
    return _repeat(r, sentence_everyday, 1, 8, r.choice([" ", " ", "\n"]))


def code_sentences(r: Rng) -> str:
    """Sentences as in the documentation of a program."""
    return _repeat(r, sentence_code, 1, 6, r.choice([" ", " ", "\n"]))


def story(r: Rng) -> str:
    """A very short story."""
    hero, friend = r.sample(FIRST_NAMES, 2)
    he, him, his = r.choice([("he", "him", "his"), ("she", "her", "her")])
    animal, animal2 = r.sample(ANIMALS, 2)
    thing, thing2 = r.sample(THINGS, 2)
    place, place2 = r.sample(PLACES, 2)
    adj, adj2, adj3 = r.sample(ADJECTIVES, 3)
    food = r.choice(FOODS)

    def pick(*options: str) -> str:
        return r.choice(options)

    parts = [
        pick(
            f"Once upon a time, there was a {adj} {animal} named {hero}.",
            f"There was once a {adj} {animal} whose name was {hero}.",
            f"{hero} was a {adj} {r.choice(JOBS)} who lived near the {place}.",
            f"Long ago, in a {adj2} {place}, there lived a {animal} called {hero}.",
        ),
        pick(
            f"Every day {he} went to the {place} to look for {food}.",
            f"{hero} loved {food} more than anything else in the world.",
            f"{he.capitalize()} had a {r.choice(COLOURS)} {thing} and a {adj2} {thing2}.",
        ),
        pick(
            f"One day, {hero} met a {animal2} named {friend}.",
            f"One morning, {friend} came to the {place} and knocked on the door.",
            f"One evening, when it was {r.choice(WEATHER)}, {hero} heard a {adj3} noise.",
        ),
        pick(
            f'"What are you doing here?" asked {friend}. '
            f'"I am looking for my {thing}," said {hero}.',
            f'"Can you help me?" asked {hero}. "Of course I can," said {friend}.',
            f'"Why are you so sad?" asked {friend}. "I have lost my {thing}," said {hero}.',
        ),
        pick(
            f"So they walked together to the {place2} and looked for the {thing}.",
            f"They went to the {place2}, but the {thing} was not there.",
            f"{friend} gave {him} a {adj3} {thing2}, and {hero} was very happy.",
        ),
        pick(
            f"They looked under the {thing2}, behind the door and in the {place2}.",
            f"On the way they saw {r.randint(2, 9)} {r.choice(ANIMALS)}s and a {r.choice(JOBS)}.",
            f"It was getting dark, and the {place2} was {adj2} and quiet.",
        ),
        pick(
            f"At last they found the {thing} in the {place}.",
            f"In the end, {hero} found {his} {thing} under a tree.",
            f'Then the {r.choice(JOBS)} said, "Here is your {thing}."',
        ),
        pick(
            f"{hero} thanked {friend}, and they became good friends.",
            "They all lived happily ever after.",
            f"From that day on, {hero} and {friend} were best friends.",
            f"That night they ate {food} and told each other stories. The end.",
        ),
    ]
    keep = [p for i, p in enumerate(parts) if i in (0, 2, 7) or r.random() < 0.85]
    extra = [sentence_everyday(r) for _ in range(24)] if r.random() < 0.06 else []
    middle = len(keep) // 2
    return r.choice([" ", "\n"]).join(keep[:middle] + extra + keep[middle:])


def proverbs(r: Rng) -> str:
    """Proverbs, alone or quoted, or a passage."""

    def one(q: Rng) -> str:
        saying = q.choice(PROVERBS)
        if q.random() < 0.1:
            saying = q.choice(PROVERBS[:4])
        if q.random() < 0.6:
            return saying
        body = saying.rstrip(".")
        return q.choice(PROVERB_FRAMES).format(
            saying=saying,
            body=body,
            lower=body[0].lower() + body[1:] if not body.startswith("I ") else body,
            name=q.choice(FIRST_NAMES),
            day=q.choice(DAYS),
        )

    if r.random() < 0.12:
        return r.choice(PASSAGES)
    return _repeat(r, one, 1, 5, r.choice([" ", "\n"]))


def unicode_text(r: Rng) -> str:
    """Sentences in other languages, symbols and emoji."""
    language = r.choice(list(FOREIGN))
    grammar = FOREIGN[language]

    def one(q: Rng) -> str:
        return "".join(q.choice(options) for options in q.choice(grammar))

    def emoji(q: Rng) -> str:
        return q.choice(EMOJI_LINES).format(
            name=q.choice(FIRST_NAMES), place=q.choice(PLACES), food=q.choice(FOODS)
        )

    if r.random() < 0.2:
        return _repeat(r, emoji, 1, 6)
    joiner = "" if language in ("zh", "ja") else " "
    return _repeat(r, one, 2, 9, r.choice([joiner, "\n"]))


def markup(r: Rng) -> str:
    """Markdown, HTML, XML or a Python function."""
    style = r.randrange(4)
    title = f"The {r.choice(ADJECTIVES)} {word(r)}"
    if style == 0:
        items = _repeat(r, lambda q: f"- {word(q)}", 2, 7)
        return f"# {title}\n\n{sentence_everyday(r)}\n\n{items}\n"
    if style == 1:
        items = _repeat(r, lambda q: f"  <li>{word(q)}</li>", 2, 7)
        return f"<h1>{title}</h1>\n<p>{sentence_everyday(r)}</p>\n<ul>\n{items}\n</ul>"
    if style == 2:
        body = _repeat(
            r,
            lambda q: (
                f'  <item id="{q.randint(1, 99)}"><name>{person(q)}</name>'
                f"<price>{_price_number(q):.2f}</price></item>"
            ),
            1,
            5,
        )
        return f"<items>\n{body}\n</items>"
    noun, kind = r.choice(CODE_NOUNS), r.choice(["int", "str", "float", "list[int]"])
    return (
        f"def get_{noun}(value: {kind}, count: int = {r.randint(0, 9)}) -> {kind}:\n"
        f'    """{sentence_code(r)}"""\n'
        f"    for i in range(count):\n        print(value, i)\n    return value"
    )


#: kind -> (generator, share of the generated bytes)
KINDS: dict[str, tuple[Generator, float]] = {
    "json": (json_records, 0.13),
    "dates": (dates, 0.07),
    "contacts": (contacts, 0.06),
    "prices": (prices, 0.05),
    "sql": (sql, 0.06),
    "names": (names, 0.05),
    "smiles": (smiles, 0.04),
    "chess": (chess, 0.03),
    "csv": (csv_lines, 0.06),
    "keyvalue": (key_values, 0.06),
    "arithmetic": (arithmetic, 0.02),
    "markup": (markup, 0.03),
    "unicode": (unicode_text, 0.09),
    "proverbs": (proverbs, 0.04),
    "story": (story, 0.08),
    "sentences": (everyday, 0.09),
    "codesentences": (code_sentences, 0.04),
}


def generate(kind: str, size: int, seed: int) -> list[str]:
    """Distinct documents of one kind, about ``size`` bytes in total (fewer if they run out)."""
    make = KINDS[kind][0]
    r = random.Random(f"{seed}/{kind}")
    seen: dict[str, None] = {}
    total = misses = 0
    while total < size and misses < 2000:
        text = make(r)
        if text in seen:
            misses += 1
            continue
        misses = 0
        seen[text] = None
        total += len(text.encode())
    return list(seen)
