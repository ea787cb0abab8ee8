def surprise(counts, student_logprobs, *, reward):
    return counts * (1 - student_logprobs) * (1 + reward[:, None])
