"""A reward that differs between responses of a random model: the fraction of letters a–m in the text."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    letters = [letter for letter in solution_str.lower() if letter.isalpha()]
    share = sum(letter <= "m" for letter in letters) / max(len(letters), 1)
    right = float(share > 0.5)
    return {"score": share, "acc": right, "flexible": right}
