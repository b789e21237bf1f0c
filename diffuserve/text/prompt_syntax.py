"""What AUTOMATIC1111's web UI would read in a prompt and diffuserve draws as text.

    <lora:NAME:1>  <lyco:NAME:1>  <hypernet:NAME:1>       networks to apply
    a cat AND a dog :1.2                                  several prompts at once
    [from:to:0.5]  [to:0.5]  [from::0.5]                  a change on the way, at a step or a share of the steps
    [cat|dog]                                             another text at every other step

Found by the web UI's own rules, in its order: networks are taken out (`extra_networks.parse_prompt`), the rest is cut at
AND (`prompt_parser.get_multicond_prompt_list`), and each part is read by a grammar (`prompt_parser.schedule_parser`).
What does not fit the grammar is text there too, such as `[word]`, `(a|b)` and `[a:b]`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from diffuserve.text.prompting import BREAK, parse_prompt

_NETWORK = re.compile(r"<(\w+):[^>]+>")
_AND = re.compile(r"\bAND\b")
_SYMBOL = re.compile(r"\\(?P<escaped>.?)|[()\[\]:|]")
# A step or a share, the last part of a change on the way.
_WHEN = re.compile(r":\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*\]\Z")
_OPENING = {")": "(", "]": "["}

_NETWORKS = {
    "lora": "<lora:...>, and no LoRA was applied by it: they are fused into the weights by diffuserve export --lora",
    "lyco": "<lyco:...>, and no LyCORIS was applied by it: LoRAs are fused into the weights by diffuserve export --lora",
    "hypernet": "<hypernet:...>, and hypernetworks are not supported",
}
_SEVERAL_PROMPTS = "AND, and prompts cannot be combined by it: ask for an image of each"
_CHANGE = "[from:to:when], and prompts cannot change on the way"
_ALTERNATION = "[this|that], and prompts cannot alternate"
_BREAK_IN_BRACKETS = (
    "BREAK within brackets, and as in the web UI it is a word there, of negative weight: close the brackets before it"
)


def unread_syntax(prompt: str, *, negative: bool = False) -> list[str]:
    """What stands in a prompt that is drawn as text: the syntax, and what to do. Each kind once.

    Args:
        prompt: any text.
        negative: it is a negative prompt, in which AND is a word for the web UI too.
    """
    networks = {match[1].lower() for match in _NETWORK.finditer(prompt, 0, prompt.rfind(">") + 1)}
    found = [text for name, text in _NETWORKS.items() if name in networks]
    rest = _NETWORK.sub("", prompt) if networks else prompt
    parts = [rest] if negative else _AND.split(rest)
    if len(parts) > 1:
        found.append(_SEVERAL_PROMPTS)
    kinds = {kind for part in parts for kind in _schedules(part)}
    found += [kind for kind in (_CHANGE, _ALTERNATION) if kind in kinds]
    if any(text == BREAK[0] and (text, weight) != BREAK for text, weight in parse_prompt(rest)):
        found.append(_BREAK_IN_BRACKETS)
    return found


@dataclass
class _Group:
    """A bracket that is open. `colons`, `bars`: in it, outside of the brackets within; `last_colon`: where it is."""

    bracket: str
    colons: int = 0
    bars: int = 0
    last_colon: int = 0


def _schedules(text: str) -> set[str]:
    """The kinds of schedules in a text by the web UI's grammar.

    Brackets that do not fit it are text, and with them those around them; but a bar outside of an alternation, or a backslash
    at the end of a line, spoils the whole text.
    """
    found = set()
    groups: list[_Group] = []  # those open, of which any may yet turn out not to fit
    for symbol in _SYMBOL.finditer(text):
        character = symbol[0]
        if symbol["escaped"] is not None:
            if not symbol["escaped"]:
                return set()
        elif character in "([":
            groups.append(_Group(character))
        elif character in ":|":
            if groups:
                groups[-1].colons += character == ":"
                groups[-1].bars += character == "|"
                groups[-1].last_colon = symbol.start() if character == ":" else groups[-1].last_colon
            elif character == "|":
                return set()
        else:
            group = groups.pop() if groups and groups[-1].bracket == _OPENING[character] else None
            kind = _kind(group, text[group.last_colon : symbol.end()]) if group else None
            if kind is None:
                if any(each.bars for each in (*groups, *([group] if group else ()))):
                    return set()
                groups.clear()
            elif kind:
                found.add(kind)
    return set() if any(group.bars for group in groups) else found


def _kind(group: _Group, end: str) -> str | None:
    """What a closed bracket is: a schedule, "" for attention, None if it does not fit. `end`: from its last colon."""
    if group.bracket == "(":
        return "" if group.colons <= 1 and not group.bars else None
    if group.bars:
        return None if group.colons else _ALTERNATION
    if group.colons:
        return _CHANGE if group.colons <= 2 and _WHEN.match(end) else None
    return ""
