"""The only use of undocumented parts of other libraries: private names, patches, the wording of messages.

Each function names what it touches (`names.uses`): a release without it disables one feature, with a message.
`docs/compatibility.md` lists them all. Nothing here imports its library before it is needed.
"""
