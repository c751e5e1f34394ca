"""A calculator for verl's tool agent loop. A recipe names this file in `rollout.multi_turn.function_tool_path`."""

import ast
import operator
from collections.abc import Callable

from verl.tools.function_tool import function_tool

LONGEST = 64
"""Maximum number of characters in an expression."""

_BINARY: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@function_tool("calculator")
def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers with +, -, *, / and parentheses, for example "3 * (2 + 4)".

    Returns:
        The result, or what is wrong with the expression.
    """
    try:
        return text_of(value_of(expression))
    except (ValueError, ZeroDivisionError, OverflowError, SyntaxError, RecursionError) as error:
        return f"error: {error}"


def value_of(expression: str) -> int | float:
    """Return the value of `expression`. Only the four operations on numbers are ever executed.

    Raises:
        ValueError, SyntaxError: the expression is not arithmetic, or is longer than `LONGEST`.
        ZeroDivisionError: the expression divides by zero.
    """
    if not isinstance(expression, str) or len(expression) > LONGEST:
        raise ValueError(f"give an expression of at most {LONGEST} characters")
    return _value(ast.parse(expression.strip().replace(",", ""), mode="eval").body)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
    raise ValueError("only numbers, + - * / and parentheses are understood")


def text_of(value: int | float) -> str:
    """Return a number as GSM8K writes it: 4 for 4.0, at most six decimals."""
    return str(int(value)) if value == int(value) else f"{value:.6f}".rstrip("0")
