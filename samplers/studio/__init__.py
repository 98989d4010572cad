"""The page to play with: `python -m samplers.studio`. Its modules import downward, and gradio nowhere but in `page`,
`theme` and `serve`; importing samplers needs none of it."""
