"""The two roles of Perceive-to-Reason: what each is asked, and what its answer means.

`boxes` reads the perceiver's answer and turns it into pixel rectangles; `prompts` words the
questions. Both are host code over text and numbers; pixels are handled on the device.
"""
