import os, signal, time, pytest
from tests.cluster.test_cluster import *
from tests.cluster.test_cluster import _standin
@pytest.mark.parametrize("n", range(6))
def test_loop(tmp_path, n):
    with make_cluster(tmp_path, make_job()) as cluster:
        cluster.wait_ready(START_S)
        before = engine(cluster, "prefill-0")
        os.kill(before.pid, signal.SIGSTOP)
        t=time.time(); wait_restarted(cluster, before); r=time.time()-t
        t=time.time(); cluster.stop(20); s=time.time()-t
        print("RESTART", r, "STOP", s)
        if s>5 or r>8: print(cluster.run_dir.launcher_log.read_text()); pytest.fail("slow")
