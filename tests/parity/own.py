"""A user's functions, for the cases of kind file."""


def squared(student, teacher):
    """Σ (S − T)²."""
    return (student.exp() - teacher.exp()).square().sum(-1)


def of_all_statistics(
    counts, position, length, reward, student_logprobs, student_entropy, teacher_logprobs, teacher_entropy
):
    """1 + t / |y| + reward + H_S · H_T + log S · log T."""
    place = position / length.clamp(min=1)[:, None]
    both = student_entropy * teacher_entropy + student_logprobs * teacher_logprobs
    return 1 + place + reward[:, None] + both


def by_turn(counts, turn):
    """1 / turn."""
    return 1 / turn.clamp(min=1)


def minus_group_mean(counts, reward):
    """1 + reward − the group's mean."""
    return (1 + reward - reward.mean())[:, None].expand(counts.shape)
