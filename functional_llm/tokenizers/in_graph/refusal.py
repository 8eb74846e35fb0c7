"""What cannot be in a graph is refused, with the reason: a result is never silently another."""


def refuse(reason: str) -> ValueError:
    """Returns the error of a tokenizer that cannot be in a graph.

    Args:
        reason: What TensorFlow cannot do in the same way, as a part of a sentence.
    """
    return ValueError(
        "This tokenizer cannot be in a TensorFlow graph with the same result. Expected: byte pairs "
        "with the usual steps around them, or a sentencepiece model. Received: "
        f"{reason}. Use `tokenizer.encode` outside the graph, before or after it."
    )
