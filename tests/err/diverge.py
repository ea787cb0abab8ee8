def gap(student):
    return student.square().sum(-1)
