"""Read verl's launch from a shell script without running anything.

Variables, defaults, arrays and arithmetic that the script sets before the launch are expanded. What only a running
shell knows (the output of a command, a branch, a variable that is not set) stays as written, and the word records the
reason.
"""

import ast
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verl_aqn.errors import ConfigError

NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_ASSIGNMENT = re.compile(rf"({NAME})(\+?)=(.*)", re.DOTALL)
_OPENS = {"if": "fi", "for": "done", "while": "done", "until": "done", "select": "done", "case": "esac", "{": "}"}
_BETWEEN = {"then", "else", "elif", "do", "!", "time", "function"}
_DECLARES = {"export", "declare", "local", "readonly", "typeset"}


@dataclass
class Word:
    """One word of a command after expansion. `problem`: why its value is unknown without a shell, or ""."""

    text: str
    line: int
    problem: str = ""


@dataclass
class Command:
    """The words of one simple command. `arrays`: the elements of a word such as `NAME=(…)`."""

    words: list[Word] = field(default_factory=list)
    arrays: dict[int, list[Word]] = field(default_factory=dict)
    within: bool = False  # inside a branch, a loop, a function or a subshell


@dataclass(frozen=True)
class Unknown:
    """The value of a variable that is not known."""

    reason: str


Value = str | list[Word] | Unknown


class Script:
    """Read a script once from beginning to end; `commands` are its simple commands, expanded.

    `arguments` are the values of `$1`, `"$@"` and so on; `environment` has variables that the script itself does not
    set. HOME becomes `~`, which recipes understand, so that a recipe can be used on another machine.
    """

    def __init__(self, text: str, arguments: Sequence[str] = (), environment: Mapping[str, str] = os.environ):
        self.text, self.at, self.line = text, 0, 1
        self.arguments, self.environment = [Word(one, 0) for one in arguments], environment
        self.variables: dict[str, Value] = {}
        self.blocks: list[str] = []
        self.commands: list[Command] = []
        while self.at < len(text):
            self._command()

    # Reading

    def _next(self, ahead: int = 0) -> str:
        return self.text[self.at + ahead : self.at + ahead + 1]

    def _take(self, count: int = 1) -> str:
        taken = self.text[self.at : self.at + count]
        self.at += len(taken)
        self.line += taken.count("\n")
        return taken

    def _blank(self) -> None:
        """Skip blanks, continued lines and comments, up to the end of the line."""
        while char := self._next():
            if char in " \t\r":
                self._take()
            elif char == "\\" and self.text[self.at + 1 :].lstrip("\r").startswith("\n"):
                self._take(self.text.index("\n", self.at) - self.at + 1)
            elif char == "#":
                end = self.text.find("\n", self.at)
                self._take((end if end >= 0 else len(self.text)) - self.at)
            else:
                return

    def _command(self) -> None:
        command, skip = Command(within=bool(self.blocks)), False
        heredocs: list[str] = []
        while True:
            self._blank()
            char = self._next()
            if char == "":
                break
            if char in "\n;&|":
                self._take()
                if char == "\n":
                    for mark in heredocs:
                        self._heredoc(mark)
                if char == "&" and self._next() == ">":  # &> file
                    continue
                break
            if char in "()":
                self._take()
                if char == "(":
                    self.blocks.append(")")
                elif self.blocks and self.blocks[-1] == ")":
                    self.blocks.pop()
                break
            if char in "<>":
                operator = re.match(r"[<>]+[&|-]?", self.text[self.at :])
                assert operator
                self._take(len(operator[0]))
                if operator[0].startswith("<<") and not operator[0].startswith("<<<"):
                    self._blank()
                    heredocs.append(self._word(command)[0].text)
                else:
                    skip = True
                continue
            number = re.match(r"\d+(?=[<>])", self.text[self.at :])
            if number:
                self._take(len(number[0]))
                continue
            words = self._word(command)
            if skip:
                skip = False
                continue
            if not command.words and words and not words[0].problem and self._reserved(words[0].text):
                command.within = bool(self.blocks)
                continue
            command.words += words
        self._end(command)

    def _reserved(self, word: str) -> bool:
        if word in _OPENS:
            self.blocks.append(_OPENS[word])
        elif self.blocks and word == self.blocks[-1]:
            self.blocks.pop()
        else:
            return word in _BETWEEN
        return word not in ("for", "case", "select")  # the words after these are not a command

    def _heredoc(self, mark: str) -> None:
        while self.at < len(self.text):
            end = self.text.find("\n", self.at)
            row = self._take((end if end >= 0 else len(self.text)) - self.at + 1)
            if row.strip() == mark:
                return

    def _word(self, command: Command) -> list[Word]:
        """Return the fields of one word of the script: one, unless an array or an unquoted variable splits it."""
        fields, line, began = [Word("", self.line)], self.line, False
        before = command.words
        settable = all(_ASSIGNMENT.fullmatch(one.text) for one in before) or before[0].text in _DECLARES

        def add(text: str, problem: str = "") -> None:
            fields[-1].text += text
            fields[-1].problem = fields[-1].problem or problem

        while (char := self._next()) and char not in " \t\r\n;&|()<>":
            if char == "\\":
                if self._next(1) == "\n":
                    self._take(2)
                    continue
                self._take()
                add(self._take())
            elif char == "'":
                end = self.text.find("'", self.at + 1)
                if end < 0:
                    raise ConfigError(f"line {line}: a quote (') is not closed")
                add(self._take(end - self.at + 1)[1:-1])
            elif char == '"':
                self._quoted(fields, add, line)
            elif char in "$`":
                assigns = settable and len(fields) == 1 and re.match(rf"{NAME}\+?=", fields[0].text)
                self._put(self._dollar(), fields, add, split=not assigns)
            else:
                add(self._take())
            began = True
            if self._next() == "(" and _ASSIGNMENT.fullmatch(fields[-1].text) and fields[-1].text.endswith("="):
                self._take()
                command.arrays[len(command.words)] = self._array()
        known = began and (len(fields) > 1 or fields[0].text or fields[0].problem or self._was_quoted())
        return fields if known else []

    def _was_quoted(self) -> bool:
        return self.text[self.at - 1] in "'\""

    def _array(self) -> list[Word]:
        elements: list[Word] = []
        while self.at < len(self.text):
            self._blank()
            if self._next() == ")":
                self._take()
                return elements
            if self._next() in "\n;&|<>(":
                self._take()
            else:
                elements += self._word(Command())
        raise ConfigError("an array ( is not closed")

    def _quoted(self, fields: list[Word], add: Any, line: int) -> None:
        self._take()
        while True:
            char = self._next()
            if char == "":
                raise ConfigError(f'line {line}: a quote (") is not closed')
            if char == '"':
                self._take()
                return
            if char == "\\" and self._next(1) in ('"', "\\", "$", "`", "\n"):
                self._take()
                taken = self._take()
                add("" if taken == "\n" else taken)
            elif char in "$`":
                self._put(self._dollar(), fields, add, split=False)
            else:
                add(self._take())

    @staticmethod
    def _put(value: Value | tuple[str, str], fields: list[Word], add: Any, *, split: bool) -> None:
        """Add the value of a $ expression.

        A list is one field per element, also in quotes; unquoted text splits at blanks.
        """
        if isinstance(value, tuple):  # the text as written, and the reason
            add(value[0], value[1])
            return
        assert not isinstance(value, Unknown)
        words = value if isinstance(value, list) else [Word(value, fields[-1].line)]
        parts = [Word(part, one.line, one.problem) for one in words for part in one.text.split()] if split else words
        if split and words and words[0].text[:1].isspace() and fields[-1].text:
            parts = [Word("", fields[-1].line), *parts]
        for number, part in enumerate(parts):
            if number:
                fields.append(Word("", part.line or fields[-1].line))
            elif part.line and not fields[-1].text:
                fields[-1].line = part.line
            add(part.text, part.problem)

    # Expanding

    def _dollar(self) -> Value | tuple[str, str]:
        """Return the value at a $ or a backtick; if it is unknown, return the text as written and the reason."""
        start, line = self.at, self.line
        found = self._expansion()
        if isinstance(found, Unknown):
            return self.text[start : self.at], f"line {line}: {found.reason}"
        return found

    def _expansion(self) -> Value:
        if self._take() == "`":
            self._skip_to("`")
            return Unknown("the output of a command, which is not run")
        char = self._next()
        if self.text.startswith("((", self.at):
            inner = self._inner("(", ")")
            return self._arithmetic(inner[1:-1]) if inner.endswith(")") else Unknown("not arithmetic")
        if char == "(":
            inner = self._inner("(", ")")
            if inner.strip() == "pwd" and "PWD" in self.environment:
                return self.environment["PWD"]
            return Unknown(f"the output of `{inner.strip()}`, which is not run")
        if char == "{":
            return self._braces(self._inner("{", "}"))
        if char == "'":
            text = self._take(self.text.index("'", self.at + 1) - self.at + 1)[1:-1]
            return Unknown("escapes in $'…'") if "\\" in text else text
        if match := re.match(rf"{NAME}|[0-9@*#?$!-]", self.text[self.at :]):
            self._take(len(match[0]))
            return self._value(match[0])
        return "$"

    def _skip_to(self, mark: str) -> None:
        while (char := self._take()) and char != mark:
            pass

    def _inner(self, opening: str, closing: str) -> str:
        """Return the text between a bracket at this position and its closing bracket, respecting quotes and nesting."""
        start, depth, quote = self.at, 0, ""
        while char := self._take():
            if char == "\\":
                self._take()
            elif quote:
                quote = "" if char == quote else quote
            elif char in "'\"":
                quote = char
            elif char == opening:
                depth += 1
            elif char == closing:
                depth -= 1
                if depth == 0:
                    return self.text[start + 1 : self.at - 1]
        raise ConfigError(f"{opening} is not closed")

    def _value(self, name: str) -> Value:
        """Return the value of a variable. Never raises ConfigError: an unknown value is returned as `Unknown`."""
        if name in ("@", "*"):
            return list(self.arguments)
        if name == "#":
            return str(len(self.arguments))
        if name.isdigit():
            number = int(name)
            if 0 < number <= len(self.arguments):
                return self.arguments[number - 1].text
            return Unknown(f"the script's argument {name} was not given")
        if name in self.variables:
            found = self.variables[name]
            return found[:1] if isinstance(found, list) else found
        if name == "HOME":
            return "~"
        if name in self.environment:
            return self.environment[name]
        return Unknown(f"{name} is set neither in the script nor in the environment")

    def _braces(self, inner: str) -> Value:
        if match := re.fullmatch(r"[@*]:(\d+)", inner):
            return self.arguments[int(match[1]) - 1 :]
        if match := re.fullmatch(rf"({NAME})\[([@*]|\d+)\]", inner):
            found = self.variables.get(match[1], Unknown(f"the array {match[1]} is not set in the script"))
            if match[2].isdigit() and isinstance(found, list):
                number = int(match[2])
                return found[number : number + 1] or ""
            return [Word(found, 0)] if isinstance(found, str) else found
        match = re.fullmatch(rf"({NAME}|[0-9@*])(\[[@*]\])?(?:(:?[-=+?])(.*)|(//?)(.*))?", inner, re.DOTALL)
        if match is None:
            return Unknown(f"${{{inner}}} is a form that is not supported")
        name, whole, operator, other, replaces, rule = match.groups()
        value = self._value(name)
        if whole and isinstance(value, list):
            value = self.variables[name]
        absent = isinstance(value, Unknown) and name not in self.variables
        if replaces:
            old, _, new = rule.partition("/")
            if isinstance(value, Unknown) or re.search(r"[*?\[$#%]", old):
                return value if isinstance(value, Unknown) else Unknown(f"${{{inner}}} replaces a pattern")
            count = -1 if replaces == "//" else 1
            texts = value if isinstance(value, list) else [Word(value, 0)]
            return [Word(one.text.replace(old, new, count), one.line, one.problem) for one in texts]
        if operator is None or (isinstance(value, Unknown) and not absent):
            return value
        empty = absent or (operator.startswith(":") and value in ("", []))
        if operator.endswith("+"):
            return "" if empty else self._text(other)
        if not empty or operator.endswith("?"):
            return value
        default = self._text(other)
        if operator.endswith("="):
            self.variables[name] = default
        return default

    def _text(self, text: str) -> Value:
        """Return the word after `:-` and similar operators, expanded as in double quotes; its quotes are removed."""
        inner = Script.__new__(Script)
        inner.__dict__ |= self.__dict__ | {"text": text + "\n", "at": 0}
        inner.commands = []
        words: list[Word] = []
        while inner.at < len(text):
            inner._blank()
            before = inner.at
            words += inner._word(Command())
            if inner.at == before:
                inner._take()
        problem = next((word.problem for word in words if word.problem), "")
        if problem:
            return Unknown(problem.partition(": ")[2])
        return " ".join(word.text for word in words)

    def _arithmetic(self, text: str) -> Value:
        """Evaluate `$((…))` with integers."""

        def number(match: re.Match) -> str:
            value = self._value(match[1])
            if isinstance(value, list):
                value = value[0].text if value else ""
            if isinstance(value, Unknown):
                raise LookupError(value.reason)
            return f"({value or 0})"

        try:
            tree = ast.parse(re.sub(rf"\$?\{{?({NAME})\}}?", number, text).strip(), mode="eval")
            return str(_reckon(tree.body))
        except LookupError as error:
            return Unknown(str(error.args[0]))
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
            return Unknown(f"$(({text})) cannot be evaluated")

    # Assigning

    def _end(self, command: Command) -> None:
        if not command.words:
            return
        first, start = command.words[0].text, 0
        if first in _DECLARES:
            start = 1
        elif first == "shift" and not command.within:
            del self.arguments[: int(command.words[1].text) if len(command.words) > 1 else 1]
        number = start
        while number < len(command.words) and (match := _ASSIGNMENT.fullmatch(command.words[number].text)):
            self._assign(command, number, match)
            number += 1
        if number < len(command.words) and not start:
            command.words = command.words[number:]
            self.commands.append(command)

    def _assign(self, command: Command, number: int, match: re.Match) -> None:
        name, more, text = match.groups()
        word = command.words[number]
        value: Value = command.arrays.get(number, Unknown(word.problem.partition(": ")[2]) if word.problem else text)
        if command.within:
            value = Unknown(f"{name} is set at line {word.line} inside a branch, a loop or a function")
        elif more:
            before = self._value(name) if name in self.variables else ""
            if isinstance(before, list) or isinstance(value, list):
                whole = self.variables.get(name, [])
                value = [*(whole if isinstance(whole, list) else []), *(value if isinstance(value, list) else [])]
            elif isinstance(before, str) and isinstance(value, str):
                value = before + value
            else:
                value = before
        self.variables[name] = value


def _reckon(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_reckon(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _reckon(node.left), _reckon(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return int(left / right)
        if isinstance(node.op, ast.Mod):
            return left - right * int(left / right)
    raise ValueError("unsupported arithmetic")
