"""`sdkit report`: runs as one web page that needs no server and no network.

`records` reads run directories and sets of runs; `scores`, `sequences`, `charts`, `completions`, `prompts`, `formula` and
`facts` choose what to show; `page` writes the file from `templates/`.
"""
