"""The explorer: a page on 127.0.0.1 that shows what the models see in an image, and attacks them while one watches.

Needs the extra ``explorer`` (FastAPI and uvicorn); importing this package alone does not.
"""
