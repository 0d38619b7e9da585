"""Chat answers judged by a language model: the protocol, the scores, their summary."""
