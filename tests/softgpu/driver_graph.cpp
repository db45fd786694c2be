// Stream capture and graphs of the stand-in for libcuda.so.1.
#include "driver.h"

using namespace softgpu::driver;

#define CUDA extern "C" SOFTGPU_EXPORT int

namespace softgpu {
namespace driver {

// Of this thread, as cuStreamBeginCapture counts: 0 global, 1 thread-local, 2 relaxed.
static thread_local int thread_mode = 0;

Result forbidden_in_capture(const char* call) {
    Result result = SUCCESS;
    if (thread_mode == 2) return SUCCESS;
    for (const CapturePtr& c : driver.captures) {
        // Global mode: no thread may; thread-local mode: not the thread that captures; relaxed mode: all may.
        if (c->mode == 2 || ((c->mode == 1 || thread_mode == 1) && c->thread != std::this_thread::get_id())) continue;
        c->invalid = true;
        result = CAPTURE_UNSUPPORTED;
    }
    return result ? complain(result, "%s while a stream captures", call) : SUCCESS;
}

static Result valid(const Capture& c, const char* call) {
    return c.invalid ? complain(CAPTURE_INVALIDATED, "%s: an earlier error has ended this capture", call) : SUCCESS;
}

Result capture_node(Stream& stream, const ActionPtr& action) {
    Capture& c = *stream.capture;
    if (Result r = valid(c, action ? action->name.c_str() : "capture")) return r;
    c.nodes.push_back({action, stream.tails});
    stream.tails = {c.nodes.size() - 1};
    return SUCCESS;
}
Result capture_record(Stream& stream, Event& event) {
    if (Result r = valid(*stream.capture, "cuEventRecord")) return r;
    event.record = nullptr;
    event.capture = stream.capture;
    event.tails = stream.tails;
    return SUCCESS;
}
Result capture_wait(Stream& stream, Event& event, bool& handled) {
    handled = stream.capture || event.capture;
    if (!handled) return SUCCESS;
    if (stream.capture)
        if (Result r = valid(*stream.capture, "cuStreamWaitEvent")) return r;
    if (!event.capture) {
        stream.capture->invalid = true;
        return complain(CAPTURE_ISOLATION, "cuStreamWaitEvent: %s captures, the event was not recorded in that capture", stream.queue->name.c_str());
    }
    if (event.capture->ended) {
        if (stream.capture) stream.capture->invalid = true;
        return complain(CAPTURED_EVENT, "cuStreamWaitEvent: the event was last recorded in a capture that has ended");
    }
    if (Result r = valid(*event.capture, "cuStreamWaitEvent")) return r;
    if (!stream.capture) {
        if (stream.legacy) {
            event.capture->invalid = true;
            return complain(CAPTURE_IMPLICIT, "cuStreamWaitEvent: the default stream cannot join a capture");
        }
        stream.capture = event.capture;
        stream.capture->streams.insert(&stream);
        stream.tails.clear();
    } else if (stream.capture != event.capture) {
        stream.capture->invalid = event.capture->invalid = true;
        return complain(CAPTURE_MERGE, "cuStreamWaitEvent: stream and event belong to different captures");
    }
    std::set<size_t> all(stream.tails.begin(), stream.tails.end());
    all.insert(event.tails.begin(), event.tails.end());
    stream.tails.assign(all.begin(), all.end());
    return SUCCESS;
}
Result not_captured(const Event& event, const char* call) {
    if (!event.capture) return SUCCESS;
    event.capture->invalid = true;
    return complain(CAPTURED_EVENT, "%s: the event was last recorded in a capture", call);
}

}  // namespace driver
}  // namespace softgpu

CUDA cuStreamBeginCapture_v2(void* stream, int mode) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    if (mode < 0 || mode > 2) return complain(INVALID_VALUE, "cuStreamBeginCapture: mode %d", mode);
    if (s->legacy) return complain(CAPTURE_UNSUPPORTED, "cuStreamBeginCapture of the default stream");
    if (s->capture) return complain(INVALID_VALUE, "cuStreamBeginCapture: it captures already");
    CapturePtr c = std::make_shared<Capture>();
    c->id = driver.next_id++;
    c->mode = mode;
    c->thread = std::this_thread::get_id();
    c->origin = s;
    c->streams.insert(s);
    s->capture = c;
    s->tails.clear();
    driver.captures.insert(c);
    return SUCCESS;
}
CUDA cuThreadExchangeStreamCaptureMode(int* mode) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    if (!mode || *mode < 0 || *mode > 2) return complain(INVALID_VALUE, "cuThreadExchangeStreamCaptureMode");
    std::swap(*mode, thread_mode);
    return SUCCESS;
}
CUDA cuStreamEndCapture(void* stream, void** graph) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    if (graph) *graph = nullptr;
    if (!s->capture) return complain(INVALID_VALUE, "cuStreamEndCapture: the stream does not capture");
    const CapturePtr c = s->capture;
    if (c->origin != s) {
        c->invalid = true;
        return complain(CAPTURE_UNMATCHED, "cuStreamEndCapture: the capture was begun on %s", c->origin->queue->name.c_str());
    }
    if (c->mode != 2 && c->thread != std::this_thread::get_id())
        return complain(CAPTURE_WRONG_THREAD, "cuStreamEndCapture in another thread than cuStreamBeginCapture");
    // Nodes that the end of this stream depends on.
    std::vector<bool> joined(c->nodes.size(), false);
    for (size_t t : s->tails) joined[t] = true;
    for (size_t i = c->nodes.size(); i-- > 0;)
        if (joined[i])
            for (size_t a : c->nodes[i].after) joined[a] = true;
    Result result = c->invalid ? CAPTURE_INVALIDATED : SUCCESS;
    if (result) complain(result, "cuStreamEndCapture: an earlier error has ended this capture");
    for (size_t i = 0; i < joined.size() && !result; i++)
        if (!joined[i])
            result = complain(CAPTURE_UNJOINED, "cuStreamEndCapture: %s, on a stream forked from this one, is not joined to it again",
                              c->nodes[i].action ? c->nodes[i].action->name.c_str() : "a node");
    c->ended = true;
    for (Stream* other : c->streams) {
        other->capture = nullptr;
        other->tails.clear();
    }
    driver.captures.erase(c);
    if (result) return result;
    if (graph) {
        Graph* g = new Graph{c->nodes, s->device};
        driver.graphs.insert(g);
        *graph = g;
    }
    return SUCCESS;
}
CUDA cuStreamIsCapturing(void* stream, int* status) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    *status = !s->capture ? 0 : s->capture->invalid ? 2 : 1;
    if (s->legacy)
        for (Stream* other : driver.streams)
            if (other->blocking && other->capture) return complain(CAPTURE_IMPLICIT, "cuStreamIsCapturing of the default stream while a blocking stream captures");
    return SUCCESS;
}
static int capture_info(void* stream, int* status, uint64_t* id, void** graph, const void** dependencies, size_t* count) {
    if (graph) *graph = nullptr;
    if (dependencies) *dependencies = nullptr;
    if (count) *count = 0;
    if (int r = cuStreamIsCapturing(stream, status)) return r;
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = find_stream(stream, s)) return r;
    if (id) *id = s->capture ? s->capture->id : 0;
    return SUCCESS;
}
CUDA cuStreamGetCaptureInfo_v2(void* stream, int* status, uint64_t* id, void** graph, const void** dependencies, size_t* count) {
    return capture_info(stream, status, id, graph, dependencies, count);
}
CUDA cuStreamGetCaptureInfo_v3(void* stream, int* status, uint64_t* id, void** graph, const void** dependencies, const void** edges, size_t* count) {
    if (edges) *edges = nullptr;
    return capture_info(stream, status, id, graph, dependencies, count);
}

CUDA cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    Graph* g = (Graph*)graph;
    if (!exec || !driver.graphs.count(g)) return complain(INVALID_VALUE, "cuGraphInstantiate: %p is not a graph", graph);
    GraphExec* e = new GraphExec{g->nodes, g->device, nullptr};
    driver.execs.insert(e);
    *exec = e;
    return SUCCESS;
}
CUDA cuGraphGetNodes(void* graph, void**, size_t* count) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    if (!driver.graphs.count((Graph*)graph)) return complain(INVALID_VALUE, "cuGraphGetNodes: %p is not a graph", graph);
    *count = ((Graph*)graph)->nodes.size();
    return SUCCESS;
}
// Every node is a queue of its own, so nodes go on in any order that the dependencies allow. Launches of one graph follow each other.
CUDA cuGraphLaunch(void* exec, void* stream) {
    Lock lock(driver.mutex);
    Stream* s;
    if (Result r = enter()) return r;
    if (Result r = find_stream(stream, s)) return r;
    GraphExec* e = (GraphExec*)exec;
    if (!driver.execs.count(e)) return complain(INVALID_VALUE, "cuGraphLaunch: %p is not an instantiated graph", exec);
    if (s->capture) {
        s->capture->invalid = true;
        return complain(CAPTURE_UNSUPPORTED, "cuGraphLaunch on a stream that captures");
    }
    DonePtr begin = std::make_shared<Done>();
    begin->what = "the begin of a graph on " + s->queue->name;
    std::vector<DonePtr> waits;
    if (e->last) waits.push_back(e->last);
    if (Result r = enqueue(*s, nullptr, waits, begin)) return r;
    std::vector<DonePtr> done(e->nodes.size());
    for (size_t i = 0; i < e->nodes.size(); i++) {
        done[i] = std::make_shared<Done>();
        Op op{e->nodes[i].action, {begin}, done[i], 0};
        for (size_t a : e->nodes[i].after) op.waits.push_back(done[a]);
        push(make_queue(s->device, "graph node"), std::move(op));
    }
    DonePtr end = std::make_shared<Done>();
    end->what = "the end of a graph on " + s->queue->name;
    done.push_back(begin);
    if (Result r = enqueue(*s, nullptr, done, end)) return r;
    e->last = end;
    return SUCCESS;
}
CUDA cuGraphExecDestroy(void* exec) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    GraphExec* e = (GraphExec*)exec;
    if (!driver.execs.erase(e)) return complain(INVALID_VALUE, "cuGraphExecDestroy: %p is not an instantiated graph", exec);
    lock.unlock();
    delete e;  // may call back: release of an operation
    return SUCCESS;
}
CUDA cuGraphDestroy(void* graph) {
    Lock lock(driver.mutex);
    if (Result r = enter()) return r;
    Graph* g = (Graph*)graph;
    if (!driver.graphs.erase(g)) return complain(INVALID_VALUE, "cuGraphDestroy: %p is not a graph", graph);
    lock.unlock();
    delete g;
    return SUCCESS;
}
