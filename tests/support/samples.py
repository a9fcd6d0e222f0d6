"""Numbers of sampled answers, for models that reply by rules."""

from firth.evaluate.prompting.requests import GenerateRequest, sample_seed


def sample_number(request: GenerateRequest) -> int:
    """Return the number of the sample that a request asks for, for a configured seed below 5."""
    numbers = [n for n in range(100) for seed in range(5) if sample_seed(seed, request.prompt, n) == request.seed]
    assert len(numbers) == 1, "no seed of a sample"
    return numbers[0]
