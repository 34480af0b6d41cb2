HYBRID, WITH_CLICKS = "hybrid_bm25", "with_clicks"
"""directories in a model's row: fused with BM25, and its scores raised by past clicks"""
