import torch
exec(open('/tmp/t.py').read().split('w=torch.tensor')[0])
from quire.kernels.reference import sampling as R
from quire.kernels.cpu import sampling as C
V=32768
for L in (1,8):
    g=torch.Generator().manual_seed(0)
    x=torch.randn(L,V,generator=g)*4
    s=torch.arange(L)
    def args(T=1.,k=0,p=1.,m=0.): return (x,torch.full((L,),T),torch.full((L,),k),torch.full((L,),p),torch.full((L,),m),s,s,s+5)
    for a in (args(0.),args(),args(k=40),args(p=.9),args(m=.05),args(k=50,p=.9,m=.02),args(T=3.,p=.95)):
        print(L,[float(q[0]) for q in a[1:5]],round(t(lambda:R.sample(*a),10)),round(t(lambda:C.sample(*a),20)), torch.equal(R.sample(*a),C.sample(*a)))
    print('lp5',t(lambda:R.token_logprobs(x,s,5),10),t(lambda:C.token_logprobs(x,s,5),20),'lpV',t(lambda:C.token_logprobs(x,s,V),10))
