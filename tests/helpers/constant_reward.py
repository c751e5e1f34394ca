"""A reward by which no answer is better than another."""


def constant(*args, **kwargs):
    return {"score": 0.0, "acc": 0.0, "flexible": 0.0}
