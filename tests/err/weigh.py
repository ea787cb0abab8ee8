def surprise(counts, student_logprobs):
    return counts * (1 - student_logprobs)
